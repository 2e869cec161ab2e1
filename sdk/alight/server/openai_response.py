"""A response of the Responses API while it is made: its object, and the events that tell of it.

Everything a response holds is an item: reasoning, a message, a function call. An item opens, grows, and closes
when something of another kind begins; each step is an event.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from alight.server.failures import Failure
from alight.server.openai_parts import chat_logprobs
from alight.target import Chunk, TokenLogprob, Usage
from alight.tools import AnswerParser, Delta

Event: TypeAlias = dict[str, Any]


class ResponseMaker:
    """Makes a response from the chunks of an answer.

    Args:
        about: the fields that only repeat the request.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.parser: AnswerParser | None = None
        self.response: dict[str, Any] = {
            "id": "resp_" + secrets.token_hex(24),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **about,
        }
        self._number = 0
        self._item: dict[str, Any] | None = None  # the one that is open
        self._call = -1  # the number of the call that is open
        self._reasoning_tokens = 0
        self._tokens: list[TokenLogprob] = []  # whose log-probabilities no event has told yet

    @property
    def output(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.response["output"]
        return items

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def read(self, chunk: Chunk) -> Iterator[Event]:
        """The events of a chunk; at the last one, also those that end the response."""
        assert self.parser is not None  # set before the first chunk
        deltas = self.parser.feed(chunk.text) if chunk.text else []
        if chunk.finish_reason:
            deltas += self.parser.finish()
        if any(delta.reasoning for delta in deltas):
            self._reasoning_tokens += len(chunk.tokens)
        self._tokens += chunk.logprobs
        for delta in deltas:
            yield from self._grow(delta)
        if chunk.finish_reason:
            yield from self._end(chunk.finish_reason == "length", chunk.usage or Usage())

    def fail(self, failure: Failure) -> Event:
        """The event of an error in the middle."""
        return self._event("error", code=failure.code, message=failure.message, param=failure.param)

    # -- items -----------------------------------------------------------------------------------

    def _grow(self, delta: Delta) -> Iterator[Event]:
        if delta.call:
            if delta.call.index != self._call:
                self._call = delta.call.index
                yield from self._open(
                    {
                        "id": "fc_" + secrets.token_hex(24),
                        "type": "function_call",
                        "call_id": delta.call.id,
                        "name": delta.call.name,
                        "arguments": "",
                    }
                )
            if delta.call.arguments:
                item = self._opened()
                item["arguments"] += delta.call.arguments
                yield self._about("response.function_call_arguments.delta", delta=delta.call.arguments)
            return
        kind, text = ("reasoning", delta.reasoning) if delta.reasoning else ("message", delta.text)
        if self._item is None or self._item["type"] != kind:
            yield from self._open(_message() if kind == "message" else _reasoning())
            part = self._empty_part()
            yield self._about("response.content_part.added", content_index=0, part=part)
            self._opened()["content"].append(dict(part))
        part = self._opened()["content"][0]
        part["text"] += text
        if kind == "reasoning":
            yield self._about("response.reasoning_text.delta", content_index=0, delta=text)
            return
        logprobs, self._tokens = chat_logprobs(self._tokens), []
        part["logprobs"] += logprobs
        yield self._about("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _open(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        item["status"] = "in_progress"
        self._item = item
        self.output.append(item)
        yield self._event("response.output_item.added", output_index=self._index(), item=item)

    def _close(self, status: str) -> Iterator[Event]:
        item = self._item
        if item is None:
            return
        if item["type"] == "function_call":
            arguments = item["arguments"]
            yield self._about("response.function_call_arguments.done", arguments=arguments, name=item["name"])
        else:
            part = item["content"][0]
            if item["type"] == "message":
                part["logprobs"] += chat_logprobs(self._tokens)
                self._tokens = []
                told = {"text": part["text"], "logprobs": part["logprobs"]}
                yield self._about("response.output_text.done", content_index=0, **told)
            else:
                yield self._about("response.reasoning_text.done", content_index=0, text=part["text"])
            yield self._about("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=self._index(), item=item)
        self._item = None

    def _end(self, cut: bool, usage: Usage) -> Iterator[Event]:
        status = "incomplete" if cut else "completed"
        yield from self._close(status)
        self.response |= {
            "status": status,
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }
        yield self._event(f"response.{status}", response=self.response)

    # -- events ----------------------------------------------------------------------------------

    def _about(self, type: str, **fields: Any) -> Event:
        """An event about the item that is open."""
        return self._event(type, item_id=self._opened()["id"], output_index=self._index(), **fields)

    def _event(self, type: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": type, "sequence_number": self._number - 1, **fields}

    def _index(self) -> int:
        return len(self.output) - 1

    def _opened(self) -> dict[str, Any]:
        assert self._item is not None
        return self._item

    def _empty_part(self) -> dict[str, Any]:
        if self._opened()["type"] == "reasoning":
            return {"type": "reasoning_text", "text": ""}
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _message() -> dict[str, Any]:
    return {"id": "msg_" + secrets.token_hex(24), "type": "message", "role": "assistant", "content": []}


def _reasoning() -> dict[str, Any]:
    return {"id": "rs_" + secrets.token_hex(24), "type": "reasoning", "summary": [], "content": []}
