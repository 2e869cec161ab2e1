"""/api/embed, and /api/embeddings, which it has replaced."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from alight.errors import BadInput, ContextExceeded
from alight.preset import Preset
from alight.server.bodies import read
from alight.server.failures import Refused
from alight.server.manager import Models
from alight.server.ollama_answers import nanoseconds
from alight.server.ollama_names import OllamaRoute, find
from alight.server.ollama_requests import EmbeddingsRequest, EmbedRequest, ModelRequest, Options
from alight.server.stream import Answers
from alight.target import Model

if TYPE_CHECKING:
    from alight.target import FloatArray

_ENDS = 2  # tokens that the model may put around a text


def router(models: Models, answers: Answers) -> APIRouter:
    api = APIRouter(route_class=OllamaRoute)

    async def vectors_of(request: Request, body: ModelRequest, texts: list[str], *, cut: bool) -> _Vectors:
        offer = await run_in_threadpool(find, models, body.model)

        def work(model: Model) -> _Vectors:
            return _Vectors(model, texts, cut=cut)  # without texts the model is made ready, as elsewhere

        options = (body.options or Options()).over(Preset.of(offer.artifact).parameters)
        return await answers.call(
            request, offer.name, work, keep_alive=body.kept(), context=options.context()
        )

    @api.post("/embed")
    async def embed(request: Request) -> Response:
        started = time.monotonic()
        body = await read(request, EmbedRequest)
        body.check()
        if (body.dimensions or 0) < 0:
            raise Refused(400, "dimensions must be 0 (all) or more", param="dimensions")
        texts = body.texts()
        made = await vectors_of(request, body, texts, cut=body.truncate is not False)
        told: dict[str, Any] = {"model": body.model, "embeddings": made.rows(body.dimensions or 0)}
        if texts:
            told |= {
                "total_duration": nanoseconds(time.monotonic() - started),
                "load_duration": nanoseconds(made.began - started),
                "prompt_eval_count": made.tokens,
            }
        return JSONResponse(told)

    @api.post("/embeddings")
    async def embeddings(request: Request) -> Response:
        """One text, one vector, and nothing else. Here it is of unit length, too."""
        body = await read(request, EmbeddingsRequest)
        body.check()
        made = await vectors_of(request, body, [body.prompt] if body.prompt else [], cut=True)
        return JSONResponse({"embedding": next(iter(made.rows()), [])})

    return api


class _Vectors:
    """Embeddings of some texts, and what they took.

    Args:
        cut: of a text that is too long, take as much of its beginning as fits.

    Raises:
        Refused: 400, a text is too long.
    """

    def __init__(self, model: Model, texts: list[str], *, cut: bool) -> None:
        self.began = time.monotonic()
        self._vectors: FloatArray | None = None
        limit = model.info.context
        fitting: list[str] = []
        while texts and self._vectors is None:
            fitting = [_fitting(model, text, limit - _ENDS) for text in texts] if cut else texts
            try:
                self._vectors = model.embed(fitting)
            except ContextExceeded as error:
                if not cut or error.context >= limit:
                    message = f"the input length exceeds the context length: {error.message}"
                    raise Refused(400, message) from None
                limit = error.context  # what a text to embed may have can be less than a conversation
        self.tokens = sum(len(model.tokenize(text, bos=True)) for text in fitting)

    def rows(self, dimensions: int = 0) -> list[list[float]]:
        """As lists. Fewer dimensions are the first ones, of unit length again: for models that put what
        matters most first."""
        import numpy as np

        if self._vectors is None:
            return []
        rows = self._vectors
        if 0 < dimensions < rows.shape[1]:
            rows = rows[:, :dimensions]
            rows = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)
        # float32 in as few digits as say it exactly; as float64 they would be twice as long.
        return [[float(str(number)) for number in row] for row in rows]


def _fitting(model: Model, text: str, limit: int) -> str:
    """As much of the beginning of a text as fits; Ollama's clients expect that of embeddings."""
    if limit <= 0:
        raise BadInput("the context is too small for any text", hint="Load the model with a larger one.")
    kept = limit
    while len(tokens := model.tokenize(text)) > limit:
        text = model.detokenize(tokens[:kept]).decode(errors="ignore")
        kept -= 1  # a text that is cut may have other tokens at its end, and more of them
    return text
