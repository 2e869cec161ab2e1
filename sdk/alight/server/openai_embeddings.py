"""/v1/embeddings, and /v1/rerank as Jina and Cohere have it."""

from __future__ import annotations

import base64
import secrets
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from alight.server.bodies import Body, check_extras, read, words
from alight.server.failures import Refused
from alight.server.stream import Answers
from alight.target import Model

if TYPE_CHECKING:
    from alight.target import FloatArray

MAX_INPUTS = 2048  # of one request, as at OpenAI


class EmbeddingRequest(Body):
    model: str
    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "cls", "last"] | None = None  # an extension

    def inputs(self) -> list[str | list[int]]:
        """Each text, or the token ids of one."""
        given = self.input
        several = isinstance(given, list) and (not given or isinstance(given[0], (str, list)))
        found = given if several else [given]
        if not 1 <= len(found) <= MAX_INPUTS:
            raise Refused(
                400, f"`input` has {len(found)} texts", hint=f"Send 1 to {MAX_INPUTS}.", param="input"
            )
        for i, one in enumerate(found):
            if isinstance(one, list) and one and all(type(token) is int for token in one):
                continue
            if not isinstance(one, str) or not one:
                where = f"input[{i}]" if several else "input"
                hint = "It must be text, or a list of token ids."
                raise Refused(
                    400,
                    f"`{where}` is {'empty' if not one else type(one).__name__}",
                    hint=hint,
                    param="input",
                )
        return found


class RerankRequest(Body):
    model: str
    query: str = Field(min_length=1)
    documents: list[str | dict[str, Any]] = Field(min_length=1, max_length=MAX_INPUTS)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None  # by default they are, as at Jina

    def texts(self) -> list[str]:
        texts = []
        for i, document in enumerate(self.documents):
            text = document.get("text") if isinstance(document, dict) else document
            if not isinstance(text, str) or not text:
                raise Refused(400, f"`documents[{i}]` has no text", param="documents")
            texts.append(text)
        return texts


def router(answers: Answers) -> APIRouter:
    api = APIRouter()

    @api.post("/embeddings")
    async def embeddings(request: Request) -> Response:
        body = await read(request, EmbeddingRequest)
        check_extras(body, words("user input_type truncate priority"), {})
        inputs = body.inputs()

        def work(model: Model) -> tuple[FloatArray, int]:
            texts = [_text(model, one, i) for i, one in enumerate(inputs)]
            tokens = sum(len(model.tokenize(text, bos=True)) for text in texts)
            return _shortened(model.embed(texts, pooling=body.pooling or ""), body.dimensions), tokens

        vectors, tokens = await answers.call(request, body.model, work)
        as_text = body.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": _base64(row) if as_text else _numbers(row)}
            for i, row in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    @api.post("/rerank")
    async def rerank(request: Request) -> Response:
        body = await read(request, RerankRequest)
        check_extras(body, words("user"), {})
        texts = body.texts()

        def work(model: Model) -> tuple[list[float], int]:
            tokens = sum(len(model.tokenize(text, bos=True)) for text in (body.query, *texts))
            return model.rerank(body.query, texts), tokens

        scores, tokens = await answers.call(request, body.model, work)
        best = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in best]
        if body.return_documents is not False:
            for result in results:
                result["document"] = {"text": texts[result["index"]]}
        return JSONResponse(
            {
                "id": "rerank-" + secrets.token_hex(12),
                "model": body.model,
                "results": results,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    return api


def _text(model: Model, given: str | list[int], index: int) -> str:
    if isinstance(given, str):
        return given
    try:
        return model.detokenize(given).decode()
    except UnicodeDecodeError:
        what = f"the tokens of input[{index}] end inside of a character"
        raise Refused(400, what, hint="Send text instead.", param="input") from None


def _shortened(vectors: FloatArray, dimensions: int | None) -> FloatArray:
    """The first dimensions, of unit length again: for models that put what matters most first."""
    import numpy as np

    width = vectors.shape[1]
    if dimensions is None or dimensions == width:
        return vectors
    if dimensions > width:
        hint = f"This model's embeddings have {width}."
        raise Refused(400, f"`dimensions` is {dimensions}", hint=hint, param="dimensions")
    cut = vectors[:, :dimensions]
    shortened: FloatArray = cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
    return shortened.astype(np.float32)


def _numbers(row: FloatArray) -> list[float]:
    # float32 in as few digits as say it exactly; as float64 they would be twice as long.
    return [float(str(number)) for number in row]


def _base64(row: FloatArray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
