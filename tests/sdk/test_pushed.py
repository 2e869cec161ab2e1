"""An answer that an engine pushes, read in either way."""

from __future__ import annotations

import gc
import threading

import pytest

from alight.errors import EngineError
from alight.pushed import Cancel, Deliver, PushedChunks
from alight.target import Chunk

END = Chunk("!", finish_reason="stop")


class Engine:
    """Keeps what it was begun with."""

    def __init__(self) -> None:
        self.deliver: Deliver | None = None
        self.cancelled = 0

    def begin(self, deliver: Deliver) -> Cancel:
        self.deliver = deliver
        return self._cancel

    def _cancel(self) -> None:
        self.cancelled += 1

    def say(self, *items: Chunk | Exception) -> None:
        assert self.deliver
        for item in items:
            self.deliver(item)


def test_reading_begins_it_and_ends_with_the_finish_reason() -> None:
    engine = Engine()
    chunks = PushedChunks(engine.begin)
    assert engine.deliver is None
    threading.Timer(0.5, lambda: engine.say(Chunk("a"), END)).start()
    read = [*chunks]
    assert read[0] == Chunk(), "a sign of life while nothing comes"
    assert "".join(chunk.text for chunk in read) == "a!"
    chunks.close()
    assert [*chunks] == [] and not engine.cancelled


def test_an_error_is_raised_once() -> None:
    engine = Engine()
    chunks = PushedChunks(engine.begin)
    next(chunks)
    engine.say(Chunk("a"), EngineError("broken"))
    assert next(chunks).text == "a"
    with pytest.raises(EngineError, match="broken"):
        next(chunks)
    assert [*chunks] == [] and not engine.cancelled


def test_closing_and_losing_it_cancel() -> None:
    engine = Engine()
    chunks = PushedChunks(engine.begin)
    next(chunks)
    chunks.close()
    assert engine.cancelled == 1 and [*chunks] == []
    chunks = PushedChunks(engine.begin)
    chunks.push(lambda _: None)
    del chunks
    gc.collect()
    assert engine.cancelled == 2


def test_closed_before_it_began_it_never_does() -> None:
    engine = Engine()
    chunks = PushedChunks(engine.begin)
    chunks.close()
    chunks.push(lambda _: None)
    assert engine.deliver is None


def test_an_error_thrown_in_cancels() -> None:
    engine = Engine()
    chunks = PushedChunks(engine.begin)
    next(chunks)
    with pytest.raises(KeyboardInterrupt):
        chunks.throw(KeyboardInterrupt())
    assert engine.cancelled == 1
