"""The OpenAI API: /v1/models, /v1/chat/completions, /v1/completions.

What a request leaves out has alight's own defaults (`alight.Sampling`: temperature 0.8, top_k 40, …, no
limit on the tokens but the context), the same as in Python and at /api; OpenAI's (temperature 1, top_p 1,
16 tokens for completions) suit large models. A field that would change the answer and is not supported
yet is refused by name; one that is not known at all, too.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Generator
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field

from alight.server.bodies import Body, check_extras, read, words
from alight.server.failures import Refused
from alight.server.models import Models, Offer
from alight.server.stream import Answer, Answers, StreamedAnswer, to_json
from alight.target import Chunk, Model, Sampling, Usage

IGNORED = words(
    "user metadata store service_tier parallel_tool_calls prediction prompt_cache_key "
    "prompt_cache_retention safety_identifier reasoning_effort verbosity"
)
NOT_YET: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}

Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(max_length=16),
]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # ignored: padding against traffic analysis


class GenerationRequest(Body):
    """What both kinds share. Those of Sampling's options that OpenAI does not have are extensions."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stop | None = None

    def sampling(self) -> Sampling:
        options = self.model_dump(exclude_none=True, include=_SAMPLING)
        if self.top_k is not None:
            options["top_k"] = max(self.top_k, 0)  # elsewhere -1 is off, too
        if self.seed is not None:
            options["seed"] = self.seed % 0xFFFFFFFF  # engines take 32 bits, and the last value as "random"
        return Sampling.of(**options)

    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


_SAMPLING = set(GenerationRequest.model_fields) & set(Sampling.__dataclass_fields__)


class ChatRequest(GenerationRequest):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None

    def sampling(self) -> Sampling:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return super().sampling()


class CompletionRequest(GenerationRequest):
    prompt: Any

    def one_prompt(self) -> str | list[int]:
        """The prompt as text or token ids; a list of one is the same as the one."""
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str) or (
            isinstance(prompt, list) and all(type(token) is int for token in prompt)
        ):
            return prompt
        if isinstance(prompt, list) and all(isinstance(one, (str, list)) for one in prompt):
            hint = "Send one request for each prompt."
            raise Refused(
                400, "`prompt` holds several prompts", hint=hint, code="unsupported", param="prompt"
            )
        raise Refused(400, "`prompt` must be text or a list of token ids", param="prompt")


def router(models: Models, answers: Answers) -> APIRouter:
    api = APIRouter(prefix="/v1")

    @api.get("/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(offer) for offer in models.list()]}

    @api.get("/models/{name:path}")
    def retrieve_model(name: str) -> dict[str, Any]:
        return _model(models.find(name))

    @api.post("/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read(request, ChatRequest)
        sampling = _checked(body)

        def begin(model: Model) -> Generator[Chunk]:
            return model.generate(model.chat_tokens(body.messages), sampling)

        answer = await answers.start(request, body.model, begin)
        return await _respond(answer, body, _ChatShape(body.model))

    @api.post("/completions")
    async def complete(request: Request) -> Response:
        body = await read(request, CompletionRequest)
        prompt, sampling = body.one_prompt(), _checked(body)
        answer = await answers.start(request, body.model, lambda model: model.generate(prompt, sampling))
        return await _respond(answer, body, _TextShape(body.model))

    return api


def _checked(body: GenerationRequest) -> Sampling:
    check_extras(body, IGNORED, NOT_YET)
    if body.stream_options:
        check_extras(body.stream_options, frozenset(), {}, "stream_options.")
    return body.sampling()


async def _respond(answer: Answer, body: GenerationRequest, shape: _Shape) -> Response:
    if body.stream:
        lines = _events(answer, shape, body.include_usage())
        return StreamedAnswer(answer, lines, lambda failure: _event(failure.openai()), "text/event-stream")
    with answer:
        whole = await answer.collect()
    return JSONResponse(shape.whole(whole.text, whole.finish_reason) | {"usage": _usage(whole.usage)})


async def _events(answer: Answer, shape: _Shape, include_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events: the pieces, the finish reason, the usage where it is wanted, and [DONE]."""
    no_usage = {"usage": None} if include_usage else {}
    last = Chunk()
    if shape.opening:
        yield _event(shape.piece(shape.opening) | no_usage)
    async for last in answer:
        if last.text:
            yield _event(shape.piece(shape.delta(last.text)) | no_usage)
    yield _event(shape.piece(shape.closing, last.finish_reason or "stop") | no_usage)
    if include_usage:
        yield _event(shape.piece(None) | {"usage": _usage(last.usage or Usage())})
    yield b"data: [DONE]\n\n"


class _Shape(ABC):
    """The JSON of one response, whole or in pieces."""

    id_prefix: str
    whole_object: str
    piece_object: str
    opening: ClassVar[dict[str, Any]]  # the first piece of a stream, if it is not empty
    closing: ClassVar[dict[str, Any]]  # the last one, which has the finish reason

    def __init__(self, model: str) -> None:
        self._head = {
            "id": self.id_prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def message(self, text: str) -> dict[str, Any]:
        """A whole answer, as part of a choice."""

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """A piece of an answer, as part of a choice."""

    def whole(self, text: str, finish_reason: str) -> dict[str, Any]:
        return {
            **self._head,
            "object": self.whole_object,
            "choices": [_choice(self.message(text), finish_reason)],
        }

    def piece(self, content: dict[str, Any] | None, finish_reason: str | None = None) -> dict[str, Any]:
        choices = [] if content is None else [_choice(content, finish_reason)]
        return {**self._head, "object": self.piece_object, "choices": choices}


class _ChatShape(_Shape):
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    piece_object = "chat.completion.chunk"
    opening: ClassVar[dict[str, Any]] = {"delta": {"role": "assistant", "content": ""}}
    closing: ClassVar[dict[str, Any]] = {"delta": {}}

    def message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}


class _TextShape(_Shape):
    id_prefix = "cmpl-"
    whole_object = piece_object = "text_completion"
    opening: ClassVar[dict[str, Any]] = {}
    closing: ClassVar[dict[str, Any]] = {"text": ""}

    def message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    delta = message


def _choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _model(offer: Offer) -> dict[str, Any]:
    created = int(offer.artifact.modified) if offer.artifact else 0
    base = {"id": offer.name, "object": "model", "created": created, "owned_by": "alight"}
    return base | {
        "loaded": offer.model is not None
    }  # an extension; alight's own clients prefer a loaded one


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"
