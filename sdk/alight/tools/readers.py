"""Streaming readers that the families share: text with marked calls, reasoning, a call that was forced.

Each holds back what could still become markup, and no more. A call is given when it is whole and valid:
only then is it certain that it is one, and what is not must come as text.
"""

from __future__ import annotations

import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from alight.text import overlap
from alight.tools.jsontext import inside_string
from alight.tools.types import Delta, ToolCall, ToolCallDelta

# Reads the inside of a call's markup: the calls, and text that followed them. ValueError: it is no call.
ReadCalls: TypeAlias = Callable[[str], tuple[list[ToolCall], str]]


class Reader(ABC):
    """An AnswerParser."""

    @abstractmethod
    def feed(self, text: str) -> list[Delta]: ...

    @abstractmethod
    def finish(self) -> list[Delta]: ...


class Calls:
    """Numbers the calls of one answer, and names those that have no id."""

    def __init__(self, *, parallel: bool = True, short_ids: bool = False) -> None:
        self.count = 0
        self._parallel = parallel
        self._short = short_ids

    def begin(self, name: str, id: str = "") -> list[Delta]:
        """The first delta of a call. Call it where there is room for one more."""
        self.count += 1
        return [Delta(call=ToolCallDelta(self.count - 1, id or self.new_id(), name))]

    def whole(self, calls: Sequence[ToolCall]) -> list[Delta]:
        """The deltas of whole calls; only of the first where calls must not be parallel."""
        deltas = []
        for call in calls:
            if self._parallel or not self.count:
                deltas += self.begin(call.name, call.id)
                deltas.append(Delta(call=ToolCallDelta(self.count - 1, arguments=call.arguments)))
        return deltas

    def new_id(self) -> str:
        return short_id() if self._short else "call_" + secrets.token_hex(12)


def short_id() -> str:
    """Nine letters and digits: Mistral's templates take no other ids."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class PlainReader(Reader):
    """Text is text."""

    def feed(self, text: str) -> list[Delta]:
        return [Delta(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


class ThinkReader(Reader):
    """Reasoning before the answer, between two tags.

    Args:
        inner: reads what follows.
        inside: the prompt ends with the opening tag already.
    """

    def __init__(self, inner: Reader, start: str, end: str, *, inside: bool = False) -> None:
        self._inner = inner
        self._start = start
        self._end = end
        self._state = "begins" if inside else "before"
        self._held = ""

    def feed(self, text: str) -> list[Delta]:
        if self._state == "after":
            return self._inner.feed(text)
        self._held += text
        deltas: list[Delta] = []
        if self._state == "before":
            begun = self._held.lstrip()
            if begun.startswith(self._start):
                self._state, self._held = "begins", begun[len(self._start) :]
            elif self._start.startswith(begun):
                return []  # still open
            else:  # no reasoning; white space is the answer's own
                return self._answer(self._held)
        if self._state == "begins":
            self._held = self._held.lstrip()
            self._state = "inside" if self._held else "begins"
        if self._state == "inside":
            reasoning, tag, rest = self._held.partition(self._end)
            if tag:
                self._state, self._held = "ends", rest
                deltas += _reasoning(reasoning.rstrip())
            else:
                cut = len(self._held) - overlap(self._held, self._end)
                cut = len(self._held[:cut].rstrip())  # white space before the tag is not part of it
                deltas += _reasoning(self._held[:cut])
                self._held = self._held[cut:]
        if self._state == "ends" and (answer := self._held.lstrip()):
            deltas += self._answer(answer)
        return deltas

    def finish(self) -> list[Delta]:
        held, self._held = self._held, ""
        if self._state == "before":
            return [*self._answer(held), *self._inner.finish()]
        if self._state in ("begins", "inside"):
            return [*_reasoning(held.rstrip()), *self._inner.finish()]
        return self._inner.finish()

    def _answer(self, text: str) -> list[Delta]:
        self._state, self._held = "after", ""
        return self._inner.feed(text)


def _reasoning(text: str) -> list[Delta]:
    return [Delta(reasoning=text)] if text else []


@dataclass(frozen=True, slots=True)
class Markup:
    """How a family marks calls in text.

    Attributes:
        begin, end: around a call; without an end, it goes to the next beginning or the end of the answer.
        read: reads what is between them.
        drop: further marks, around several calls, that say nothing.
        bare: reads a whole answer that begins with "{" and has no mark: small models forget it.
        json: inside is JSON, in whose strings a mark is text.
    """

    begin: str
    end: str
    read: ReadCalls
    drop: tuple[str, ...] = ()
    bare: ReadCalls | None = None
    json: bool = True


class MarkedReader(Reader):
    """Text, with calls between marks."""

    def __init__(self, markup: Markup, calls: Calls) -> None:
        self._markup = markup
        self._calls = calls
        self._held = ""
        self._space = ""  # white space that waits for what follows: before a call it is dropped
        self._begun = markup.bare is None  # whether it is decided how the answer begins
        self._bare = False
        self._inside = False
        self._from = 0  # where, inside, the search for the end goes on

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        if not self._begun:
            begun = self._held.lstrip()
            if not begun:
                return []
            self._begun = True
            self._bare = begun.startswith("{")
        if self._bare:
            return []  # only its end says what it was
        deltas: list[Delta] = []
        while self._step(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        deltas: list[Delta] = []
        if self._bare and self._markup.bare:
            self._bare = False
            try:
                calls, rest = self._markup.bare(self._held)
                return self._calls.whole(calls) + (self._text(rest) if rest.strip() else [])
            except ValueError:
                deltas += self.feed("")  # an answer that happens to begin like a call
        if self._inside:
            deltas += self._segment(self._held, self._markup.read)
        else:
            deltas += self._text(self._held)
        self._held = ""
        if not self._calls.count and self._space:
            deltas.append(Delta(self._space))
        return deltas

    def _step(self, deltas: list[Delta]) -> bool:
        """Go on to the next mark, if it is there."""
        markup = self._markup
        if self._inside:
            at = self._end()
            if at < 0:
                return False
            deltas += self._segment(self._held[:at], markup.read)
            self._held = self._held[at + len(markup.end) :]
            self._inside = False
            return True
        marks = (markup.begin, *markup.drop)
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if not found:
            cut = len(self._held) - max(overlap(self._held, mark) for mark in marks)
            deltas += self._text(self._held[:cut])
            self._held = self._held[cut:]
            return False
        at, mark = min(found)
        deltas += self._text(self._held[:at])
        self._held = self._held[at + len(mark) :]
        self._inside = mark == markup.begin
        self._from = 0
        return True

    def _end(self) -> int:
        """Where the call that is held ends; -1 if its end has not come."""
        mark = self._markup.end or self._markup.begin
        while (at := self._held.find(mark, self._from)) >= 0:
            if not self._markup.json or not inside_string(self._held[:at]):
                return at
            self._from = at + len(mark)
        self._from = max(self._from, len(self._held) - len(mark) + 1)
        return -1

    def _segment(self, text: str, read: ReadCalls) -> list[Delta]:
        try:
            calls, rest = read(text)
        except ValueError:
            return self._text(text)
        self._space = ""
        return self._calls.whole(calls) + (self._text(rest) if rest.strip() else [])

    def _text(self, text: str) -> list[Delta]:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return [Delta(shown)] if shown else []


class ForcedReader(Reader):
    """A call that the prompt has begun: all that comes is its arguments, checked by a grammar.

    Args:
        name: of the function; None if the text begins with it, in a line of its own.
    """

    def __init__(self, name: str | None, calls: Calls) -> None:
        self._name = name
        self._calls = calls
        self._held = ""

    def feed(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        if not self._calls.count:
            if self._name is None:
                self._held += text
                name, newline, text = self._held.partition("\n")
                if not newline:
                    return []
                self._name = name
            deltas += self._calls.begin(self._name)
        if text:
            deltas.append(Delta(call=ToolCallDelta(0, arguments=text)))
        return deltas

    def finish(self) -> list[Delta]:
        if self._calls.count:
            return []
        return self._calls.begin(self._name) if self._name else PlainReader().feed(self._held)
