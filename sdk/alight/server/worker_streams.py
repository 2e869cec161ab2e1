"""The generations of a worker. What all of them say in one step of the engine goes to the server in one frame."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from queue import SimpleQueue
from typing import TypeAlias

from alight.errors import AlightError, EngineError
from alight.pushed import PushedChunks
from alight.server import worker_protocol as protocol
from alight.server.worker_protocol import Channel
from alight.target import Chunk

log = logging.getLogger(__name__)

_Item: TypeAlias = "Chunk | Exception"


class Streams:
    """The generations in progress, by the number of their request."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._streams: dict[int, _Stream] = {}
        self._said: SimpleQueue[tuple[int, _Item]] = SimpleQueue()
        threading.Thread(target=self._tell, name="alight-teller", daemon=True).start()

    def __len__(self) -> int:
        return len(self._streams)

    def begin(self, number: int, generate: Callable[[], Generator[Chunk]]) -> None:
        """Run a generation. It is known at once, so that a cancel which follows finds it."""
        stream = self._streams[number] = _Stream()
        threading.Thread(target=self._run, args=(number, stream, generate), daemon=True).start()

    def cancel(self, number: int) -> None:
        if stream := self._streams.pop(number, None):
            stream.cancel()

    def cancel_all(self) -> None:
        for number in [*self._streams]:
            self.cancel(number)

    def _run(self, number: int, stream: _Stream, generate: Callable[[], Generator[Chunk]]) -> None:
        def deliver(item: _Item) -> None:
            if not isinstance(item, Chunk) or item.finish_reason:
                self._streams.pop(number, None)
            self._said.put((number, item))

        last = Chunk()

        try:
            chunks = generate()
            if not stream.opened(chunks):
                return
            if isinstance(chunks, PushedChunks):
                chunks.push(deliver)
                return
            with closing(chunks):
                for last in chunks:
                    if stream.cancelled:
                        return
                    deliver(last)
            if not last.finish_reason:
                raise EngineError("the engine ended an answer without saying why")
        except Exception as error:
            if not isinstance(error, AlightError):
                log.error("a request failed", exc_info=error)
            deliver(error)

    def _tell(self) -> None:
        while True:
            items = [self._said.get()]
            items += [self._said.get() for _ in range(self._said.qsize())]  # nobody else takes any
            try:
                self._send(items)
            except Exception:  # one of them cannot be told: the others can
                for item in items:
                    self._send_alone(*item)

    def _send(self, items: list[tuple[int, _Item]]) -> None:
        told = [[number, protocol.said_to_json(item)] for number, item in items]
        with suppress(OSError):  # the server is gone, and so are we in a moment
            self._channel.send({"id": protocol.CHUNKS, "chunks": told})

    def _send_alone(self, number: int, item: _Item) -> None:
        try:
            self._send([(number, item)])
        except Exception as error:
            log.exception("what the engine said cannot be told")
            self.cancel(number)
            self._send([(number, EngineError(f"the engine said what cannot be told: {error}"))])


class _Stream:
    """One generation, which may be cancelled before it has begun."""

    def __init__(self) -> None:
        self.cancelled = False
        self._lock = threading.Lock()
        self._chunks: Generator[Chunk] | None = None

    def opened(self, chunks: Generator[Chunk]) -> bool:
        """The model has taken it on; False if nobody wants it any more."""
        with self._lock:
            self._chunks = chunks
            return not self.cancelled

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            chunks = self._chunks
        if isinstance(chunks, PushedChunks):
            chunks.close()
