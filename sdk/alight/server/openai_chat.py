"""/v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from alight.server.bodies import read
from alight.server.images import check_sight, with_images
from alight.server.manager import Models
from alight.server.openai_bodies import ChatRequest, blaming, schema_of, thinks
from alight.server.openai_brought import Brought
from alight.server.openai_parts import chat_logprobs, event, usage_of
from alight.server.several import Several
from alight.server.stream import Answers, Begin, StreamedAnswer
from alight.target import Chunk, Model, Sampling, TokenLogprob, Usage
from alight.tools import Answer, AnswerParser, Delta, can_think, check_tools, prepare_chat


def router(models: Models, answers: Answers) -> APIRouter:
    api = APIRouter()

    @api.post("/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read(request, ChatRequest)
        body.check()
        call = _Call(body, models)
        choices = [_Choice(index) for index in range(body.choices)]
        several = await Several.start(answers, request, body.model, [call.begin(c) for c in choices])
        head = _Head(body.model)
        if body.stream:
            lines = _events(several, choices, head, include_usage=body.include_usage)
            return StreamedAnswer(
                several, lines, lambda failure: event(failure.openai()), "text/event-stream"
            )
        with several:
            async for index, chunk in several:
                choices[index].read(chunk)
        whole = head.of("chat.completion", [choice.whole() for choice in choices])
        return JSONResponse(whole | {"usage": _usage(choices)})

    return api


class _Call:
    """A request, checked as far as is possible without the model."""

    def __init__(self, body: ChatRequest, models: Models) -> None:
        self.body = body
        self.models = models
        body.chat_sampling(Sampling())  # raises
        self.messages = with_images(body.messages)
        self.schema = schema_of(body.response_format, "response_format")
        self.think = thinks(body.reasoning_effort, "reasoning_effort")
        self.choice: Any = "auto" if body.tool_choice is None else body.tool_choice
        with blaming("tools"):
            check_tools(body.tools)
        with blaming("tool_choice"):
            check_tools(body.tools, self.choice)

    def begin(self, choice: _Choice) -> Begin:
        """What generates one of the answers. They differ by their seed."""

        def begin(model: Model) -> Generator[Chunk]:
            body = self.body
            body.check_tokens(model)
            brought = Brought.of(self.models, body.model)
            sampling = body.chat_sampling(brought.sampling)
            if sampling.seed is not None:
                sampling = replace(sampling, seed=sampling.seed + choice.index)
            view = brought.view(model)
            check_sight(model, self.messages)
            prepared = prepare_chat(
                view,
                brought.preset.apply_to(self.messages),
                tools=body.tools,
                tool_choice=self.choice,
                parallel=body.parallel_tool_calls is not False,
                json_schema=self.schema,
                think=self.think if can_think(view.template) else None,  # an effort, not an order
            )
            choice.parser = prepared.parser
            return prepared.generate(model, sampling)

        return begin


@dataclass(slots=True)
class _Choice:
    """One of the answers to a request, as it comes."""

    index: int
    parser: AnswerParser | None = None
    deltas: list[Delta] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)  # with log-probabilities, where those are wanted
    called: bool = False
    reason: str | None = None
    usage: Usage = field(default_factory=Usage)

    def read(self, chunk: Chunk) -> list[Delta]:
        """The deltas of a chunk; they are kept, too."""
        assert self.parser is not None  # set before the first chunk
        deltas = self.parser.feed(chunk.text) if chunk.text else []
        if chunk.finish_reason:
            deltas += self.parser.finish()
        self.called = self.called or any(delta.call for delta in deltas)
        if chunk.finish_reason:
            self.reason = (
                "tool_calls" if self.called and chunk.finish_reason == "stop" else chunk.finish_reason
            )
            self.usage = chunk.usage or Usage()
        self.deltas += deltas
        self.tokens += chunk.logprobs
        return deltas

    def forget(self) -> list[TokenLogprob]:
        """Let go of what has been sent, and give the log-probabilities that have not."""
        tokens, self.tokens, self.deltas = self.tokens, [], []
        return tokens

    def whole(self) -> dict[str, Any]:
        answer = Answer.of(self.deltas)
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in answer.calls
            ]
        return self._as({"message": message}, self.tokens)

    def piece(self, delta: dict[str, Any], tokens: list[TokenLogprob]) -> dict[str, Any]:
        return self._as({"delta": delta}, tokens)

    def _as(self, content: dict[str, Any], tokens: list[TokenLogprob]) -> dict[str, Any]:
        logprobs = {"content": chat_logprobs(tokens), "refusal": None} if tokens else None
        return {"index": self.index, **content, "logprobs": logprobs, "finish_reason": self.reason}


class _Head:
    """What all parts of an answer begin with."""

    def __init__(self, model: str) -> None:
        self._id = "chatcmpl-" + secrets.token_hex(12)
        self._created = int(time.time())
        self._model = model

    def of(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "created": self._created,
            "model": self._model,
            "object": kind,
            "choices": choices,
        }


async def _events(
    several: Several, choices: list[_Choice], head: _Head, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events: the pieces, the finish reasons, the usage where it is wanted, and [DONE]."""
    no_usage = {"usage": None} if include_usage else {}

    def line(choice: _Choice, delta: dict[str, Any], tokens: list[TokenLogprob]) -> bytes:
        return event(head.of("chat.completion.chunk", [choice.piece(delta, tokens)]) | no_usage)

    for choice in choices:
        yield line(choice, {"role": "assistant", "content": ""}, [])
    async for index, chunk in several:
        choice = choices[index]
        deltas = choice.read(chunk)
        reason, choice.reason = choice.reason, None  # that has an event of its own
        for delta in deltas:
            yield line(choice, _delta(delta), choice.forget())
        choice.reason = reason
        if reason:
            yield line(choice, {}, choice.forget())
    if include_usage:
        yield event(head.of("chat.completion.chunk", []) | {"usage": _usage(choices)})
    yield b"data: [DONE]\n\n"


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.call:
        function: dict[str, Any] = {"arguments": delta.call.arguments}
        call: dict[str, Any] = {"index": delta.call.index, "function": function}
        if delta.call.name:
            function["name"] = delta.call.name
            call |= {"id": delta.call.id, "type": "function"}
        return {"tool_calls": [call]}
    if delta.reasoning:
        return {"reasoning_content": delta.reasoning}
    return {"content": delta.text}


def _usage(choices: list[_Choice]) -> dict[str, Any]:
    """The prompt, which all choices share, counts once."""
    made = sum(choice.usage.completion_tokens for choice in choices)
    return usage_of([replace(choices[0].usage, completion_tokens=made)])
