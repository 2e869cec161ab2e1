"""What the tools package gives and takes: deltas of an answer, calls, and a prepared conversation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call, as OpenAI streams it: the first piece of a call has its id and name."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""  # a fragment of the JSON text


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer; exactly one of the three is set."""

    text: str = ""
    reasoning: str = ""
    call: ToolCallDelta | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call; `arguments` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, taken apart."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = field(default=())

    @classmethod
    def of(cls, deltas: Iterable[Delta]) -> Answer:
        """Put the pieces together."""
        text: list[str] = []
        reasoning: list[str] = []
        calls: dict[int, ToolCall] = {}
        for delta in deltas:
            text.append(delta.text)
            reasoning.append(delta.reasoning)
            if piece := delta.call:
                old = calls.get(piece.index, ToolCall("", "", ""))
                calls[piece.index] = ToolCall(
                    piece.id or old.id, piece.name or old.name, old.arguments + piece.arguments
                )
        return cls("".join(text), "".join(reasoning), tuple(calls[i] for i in sorted(calls)))


class AnswerParser(Protocol):
    """Takes the text of one answer apart while it comes. However the text is cut, the deltas say the same."""

    def feed(self, text: str) -> list[Delta]:
        """What is certain after this piece of text."""

    def finish(self) -> list[Delta]:
        """The rest, at the end of the answer. What is no valid call after all comes as text."""
