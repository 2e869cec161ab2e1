"""An answer whose engine has a thread of its own: it can be read as an iterator, or be pushed to whoever wants it.

A server with many answers takes them pushed: an iterator needs a thread for each, which the system would wake up
for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TypeAlias

from alight.target import Chunk

Deliver: TypeAlias = "Callable[[Chunk | Exception], None]"
Cancel: TypeAlias = "Callable[[], None]"

_LIFE = 0.2  # seconds without a chunk after which the iterator gives an empty one


class PushedChunks(Generator[Chunk, None, None]):
    """The chunks of one answer. Iterate over them, or call `push`; nothing begins before that.

    Args:
        begin: starts the answer. It hands each chunk to the function given, from another thread, and last one with a
            finish reason or the error that ended the answer. Returns what cancels it, which may be called late. All
            that waits for a reader is what the model's context allows, so there is no other bound.
    """

    def __init__(self, begin: Callable[[Deliver], Cancel]) -> None:
        self._begin = begin
        self._cancel: Cancel | None = None
        self._queue: SimpleQueue[Chunk | Exception] | None = None
        self._ended = False

    def push(self, deliver: Deliver) -> None:
        """Begin, and have every chunk handed to `deliver`, which must not block.

        Keep this object meanwhile: when it is lost, the answer is cancelled.
        """
        if not self._ended:
            self._cancel = self._begin(deliver)
        if self._ended and self._cancel:  # closed meanwhile
            self._cancel()

    def __next__(self) -> Chunk:
        if self._ended:
            raise StopIteration
        if self._queue is None:
            self._queue = SimpleQueue()
            try:
                self.push(self._queue.put)
            except BaseException:
                self._ended = True
                raise
        try:
            item = self._queue.get(timeout=_LIFE)
        except Empty:
            return Chunk()  # so that whoever reads it can look whether anyone still waits for it
        if isinstance(item, Exception):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    def send(self, value: None) -> Chunk:
        return next(self)

    def throw(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> Chunk:
        self.close()
        raise typ if isinstance(typ, BaseException) or not isinstance(val, BaseException) else val

    def close(self) -> None:
        """Cancel, unless it has ended."""
        if not self._ended:
            self._ended = True
            if self._cancel:
                self._cancel()

    def __del__(self) -> None:
        self.close()
