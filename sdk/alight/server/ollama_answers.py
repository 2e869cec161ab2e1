"""Answers as Ollama writes them: in lines while they come, or in one piece."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse, Response

from alight.server.ollama_models import timestamp
from alight.server.stream import Answer, StreamedAnswer, to_json
from alight.target import Chunk, TokenLogprob, Usage
from alight.tools import AnswerParser, Delta, ToolCall


@dataclass(slots=True)
class Piece:
    """What one line says of an answer, or all of it."""

    text: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.thinking or self.calls or self.logprobs)

    def add(self, other: Piece) -> None:
        self.text += other.text
        self.thinking += other.thinking
        self.calls += other.calls
        self.logprobs += other.logprobs


class Shape(ABC):
    """The JSON of one kind of answer."""

    def __init__(self, model: str) -> None:
        self._model = model

    @abstractmethod
    def content(self, piece: Piece) -> dict[str, Any]:
        """The part of a line that holds the answer itself."""

    def line(self, piece: Piece, *, done: bool) -> dict[str, Any]:
        line = {
            "model": self._model,
            "created_at": timestamp(time.time()),
            **self.content(piece),
            "done": done,
        }
        return line | ({"logprobs": piece.logprobs} if piece.logprobs else {})

    def empty(self, reason: str) -> Response:
        """The answer to a request that only loads or unloads the model."""
        return JSONResponse(self.line(Piece(), done=True) | {"done_reason": reason})


class ChatShape(Shape):
    def content(self, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text}
        if piece.thinking:
            message["thinking"] = piece.thinking
        if piece.calls:
            message["tool_calls"] = piece.calls
        return {"message": message}


class GenerateShape(Shape):
    def content(self, piece: Piece) -> dict[str, Any]:
        return {"response": piece.text} | ({"thinking": piece.thinking} if piece.thinking else {})


class Plain:
    """The parser of an answer that is all text."""

    def feed(self, text: str) -> list[Delta]:
        return [Delta(text=text)] if text else []

    def finish(self) -> list[Delta]:
        return []


class Reader:
    """Turns chunks into pieces. Ollama's clients get a tool call whole, with its arguments as an object."""

    def __init__(self, parser: AnswerParser) -> None:
        self.parser = parser
        self._calls: dict[int, ToolCall] = {}  # those that are not complete
        self._told = 0
        self.tokens: list[int] = []
        self.last = Chunk()

    def feed(self, chunk: Chunk) -> Piece:
        self.last = chunk
        self.tokens += chunk.tokens
        return self._piece(self.parser.feed(chunk.text), chunk.logprobs)

    def finish(self) -> Piece:
        """What was held back until the end."""
        piece = self._piece(self.parser.finish(), ())
        piece.calls += [self._tell(self._calls.pop(index)) for index in sorted(self._calls)]
        return piece

    def _piece(self, deltas: Iterable[Delta], logprobs: Sequence[TokenLogprob]) -> Piece:
        piece = Piece(logprobs=[_logprob(one) for one in logprobs])
        for delta in deltas:
            piece.text += delta.text
            piece.thinking += delta.reasoning
            if part := delta.call:
                old = self._calls.get(part.index, ToolCall("", "", ""))
                call = ToolCall(part.id or old.id, part.name or old.name, old.arguments + part.arguments)
                self._calls[part.index] = call
                if _is_complete(call.arguments):
                    piece.calls.append(self._tell(self._calls.pop(part.index)))
        return piece

    def _tell(self, call: ToolCall) -> dict[str, Any]:
        function = {"index": self._told, "name": call.name, "arguments": _object(call.arguments)}
        self._told += 1
        return {"id": call.id, "function": function}


async def respond(
    answer: Answer, reader: Reader, shape: Shape, ending: Ending, *, stream: bool | None
) -> Response:
    """Answer in lines, or in one piece where `stream` is false."""
    if stream is not False:
        return StreamedAnswer(
            answer,
            _lines(answer, reader, shape, ending),
            lambda failure: _ndjson(failure.ollama()),
            "application/x-ndjson",
        )
    whole = Piece()
    with answer:
        async for chunk in answer:
            whole.add(reader.feed(chunk))
        whole.add(reader.finish())
    return JSONResponse(shape.line(whole, done=True) | ending.of(answer, reader))


async def _lines(answer: Answer, reader: Reader, shape: Shape, ending: Ending) -> AsyncIterator[bytes]:
    async for chunk in answer:
        if piece := reader.feed(chunk):
            yield _ndjson(shape.line(piece, done=False))
    if piece := reader.finish():
        yield _ndjson(shape.line(piece, done=False))
    yield _ndjson(shape.line(Piece(), done=True) | ending.of(answer, reader))


@dataclass(slots=True)
class Ending:
    """The fields of the last line: why the answer ended and what it took.

    Attributes:
        prompt: the prompt's tokens, for the `context` that a later request may go on from; None leaves it out.
    """

    prompt: list[int] | None = None

    def of(self, answer: Answer, reader: Reader) -> dict[str, Any]:
        usage = reader.last.usage or Usage()
        context = {} if self.prompt is None else {"context": [*self.prompt, *reader.tokens]}
        return context | {
            "done_reason": reader.last.finish_reason or "stop",
            "total_duration": nanoseconds(time.monotonic() - answer.started),
            "load_duration": nanoseconds(answer.load_seconds),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": nanoseconds(usage.prompt_seconds),
            "eval_count": usage.completion_tokens,
            "eval_duration": nanoseconds(usage.decode_seconds),
        }


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _is_complete(arguments: str) -> bool:
    """Whether it is the whole JSON text of an object: no beginning of one is JSON itself."""
    if not arguments.rstrip().endswith("}"):
        return False
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


def _object(arguments: str) -> dict[str, Any]:
    return json.loads(arguments) if _is_complete(arguments) else {}


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    told = _token(one.text, one.logprob)
    if one.top:
        told["top_logprobs"] = [_token(text, logprob) for _, text, logprob in one.top]
    return told


def _token(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text.decode(errors="replace"), "logprob": logprob, "bytes": list(text)}


def _ndjson(data: dict[str, Any]) -> bytes:
    return to_json(data) + b"\n"
