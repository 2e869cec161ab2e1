"""/api/chat and /api/generate."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from alight.preset import Preset, adapters_of
from alight.server.bodies import read
from alight.server.failures import Refused
from alight.server.images import check_sight, no_images
from alight.server.manager import Models, Offer
from alight.server.ollama_answers import ChatShape, Ending, GenerateShape, Plain, Reader, Shape, respond
from alight.server.ollama_insert import insert_tokens
from alight.server.ollama_names import OllamaRoute, find
from alight.server.ollama_requests import (
    ChatRequest,
    GenerateRequest,
    GenerationRequest,
    Options,
    as_openai,
    seen,
)
from alight.server.ollama_template import as_jinja
from alight.server.ollama_view import with_template
from alight.server.stream import Answers
from alight.target import Chunk, Model, Sampling, without_images
from alight.tools import PreparedChat, can_think, prepare_chat


def router(models: Models, answers: Answers) -> APIRouter:
    api = APIRouter(route_class=OllamaRoute)

    @api.post("/chat")
    async def chat(request: Request) -> Response:
        body = await read(request, ChatRequest)
        body.check()
        call = await run_in_threadpool(_Call.of, models, body)
        messages = [as_openai(message, index) for index, message in enumerate(body.messages or [])]
        shape = ChatShape(body.model)
        if not messages:
            return await _load_or_unload(request, models, answers, call, shape)
        reader = Reader(Plain())

        def begin(model: Model) -> Generator[Chunk]:
            view = call.view(model)
            check_sight(model, messages, "images")
            prepared = prepare_chat(
                view,
                call.preset.apply_to(messages),
                tools=body.tools,
                json_schema=body.json_schema(),
                think=call.think(view),
            )
            reader.parser = prepared.parser
            return prepared.generate(model, call.sampling)

        answer = await answers.start(request, call.name, begin, keep_alive=body.kept(), context=call.context)
        return await respond(answer, reader, shape, Ending(), stream=body.stream)

    @api.post("/generate")
    async def generate(request: Request) -> Response:
        body = await read(request, GenerateRequest)
        body.check()
        call = await run_in_threadpool(_Call.of, models, body)
        shape = GenerateShape(body.model)
        parts = seen(body.images or [], body.prompt, "images")
        images = [part["data"] for part in parts[:-1]]
        if not body.prompt:
            return await _load_or_unload(request, models, answers, call, shape)
        reader, ending = Reader(Plain()), Ending()

        def begin(model: Model) -> Generator[Chunk]:
            if images and not model.info.vision:
                raise no_images("images")
            view = call.view(model, as_jinja(body.template or ""))
            think = call.think(view)
            if body.raw:
                # Whoever writes the whole prompt writes its control tokens, too.
                tokens = model.tokenize(body.prompt or "", bos=True, special=True)
                return model.generate(_after_beginning(model, images, tokens), call.constrained())
            if body.suffix:
                template = body.template or call.preset.written
                ending.prompt = insert_tokens(model, call.offer, template, body.prompt or "", body.suffix)
                return model.generate(ending.prompt, call.constrained())
            prepared = _prepare_prompt(view, body, call, think, parts)
            # A context is of token ids, so there is none of a prompt with images.
            ending.prompt = None if images else without_images(prepared.tokens, body.model)
            reader.parser = prepared.parser
            return prepared.generate(model, call.sampling)

        answer = await answers.start(request, call.name, begin, keep_alive=body.kept(), context=call.context)
        return await respond(answer, reader, shape, ending, stream=body.stream)

    return api


@dataclass(slots=True)
class _Call:
    """A request together with the model it is for."""

    body: GenerationRequest
    offer: Offer
    preset: Preset
    sampling: Sampling
    context: int | None  # tokens that the model is to hold

    @classmethod
    def of(cls, models: Models, body: GenerationRequest) -> _Call:
        """Raises ModelNotFound, and BadInput for an option that cannot be."""
        offer = find(models, body.model)
        preset = Preset.of(offer.artifact)
        options = (body.options or Options()).over(preset.parameters)
        adapters = adapters_of(offer.artifact) if offer.artifact else ()
        sampling = options.sampling(
            logprobs=body.wanted_logprobs(), adapters=tuple((name, 1.0) for name, _ in adapters)
        )
        return cls(body, offer, preset, sampling, options.context())

    @property
    def name(self) -> str:
        return self.offer.name

    def constrained(self) -> Sampling:
        """The sampling of an answer that nothing takes apart; else `prepare_chat` sees to the schema."""
        return replace(self.sampling, json_schema=self.body.json_schema())

    def view(self, model: Model, template: str = "") -> Model:
        """The model with the template of the request, or the one that was set for it."""
        return with_template(model, template or self.preset.template)

    def think(self, view: Model) -> bool | None:
        """Whether the model is to reason first; None for one that cannot. As in Ollama, one that can does.

        Raises:
            Refused: 400, it is asked to, and cannot.
        """
        if can_think(view.template):
            return self.body.think is None or bool(self.body.think)
        if self.body.think:
            raise Refused(
                400, f'"{self.body.model}" does not support thinking', code="unsupported", param="think"
            )
        return None


def _prepare_prompt(
    view: Model, body: GenerateRequest, call: _Call, think: bool | None, parts: list[dict[str, Any]]
) -> PreparedChat:
    """A prompt through the chat template, after the conversation that is in `context`.

    Args:
        parts: its images, and its text.
    """
    system = body.system or call.preset.system
    if view.template.source or system:
        messages: list[Mapping[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages += call.preset.messages if body.context is None else ()
        messages.append({"role": "user", "content": parts if len(parts) > 1 else body.prompt or ""})
        prepared = prepare_chat(view, messages, json_schema=body.json_schema(), think=think)
    else:  # a base model: as in Ollama, the prompt is then all there is
        plain = view.tokenize(body.prompt or "", bos=True)
        images = [part["data"] for part in parts[:-1]]
        tokens = _after_beginning(view, images, plain)
        prepared = PreparedChat(tokens, Plain(), json_schema=body.json_schema())
    if not body.context:
        return prepared
    tokens, beginning = prepared.tokens, view.tokenize("", bos=True)
    if beginning and tokens[: len(beginning)] == beginning:  # has its place at the very beginning only
        tokens = tokens[len(beginning) :]
    return replace(prepared, tokens=[*body.context, *tokens])


def _after_beginning(model: Model, images: list[bytes], tokens: list[int]) -> list[int | bytes]:
    """A prompt without a template: images come first, but for the token that begins every text."""
    beginning = model.tokenize("", bos=True)
    first = len(beginning) if tokens[: len(beginning)] == beginning else 0
    return [*tokens[:first], *images, *tokens[first:]]


async def _load_or_unload(
    request: Request, models: Models, answers: Answers, call: _Call, shape: Shape
) -> Response:
    """An empty prompt: nothing is generated, the model is made ready, or let go."""
    kept = call.body.kept()
    if kept == 0:
        await run_in_threadpool(models.unload, call.name)
        return shape.empty("unload")
    with await answers.start(request, call.name, _no_chunks, keep_alive=kept, context=call.context):
        return shape.empty("load")


def _no_chunks(model: Model) -> Generator[Chunk]:  # noqa: ARG001
    yield from ()
