"""The bridge from a model's answers to the event loop.

Each answer has a thread that waits for its turn and begins it. Chunks that the engine pushes go straight to the event
loop, all of one step together; those of a generator are drawn by the thread. When the client goes away the answer is
cancelled.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, closing
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from alight.errors import AlightError, EngineError
from alight.pushed import PushedChunks
from alight.server.failures import ClientGone, Failure, Refused
from alight.server.manager import Models
from alight.server.metrics import Metrics, Watch
from alight.target import Chunk, Completion, Model

log = logging.getLogger(__name__)

Begin: TypeAlias = Callable[[Model], Generator[Chunk]]
T = TypeVar("T")

AHEAD = 256  # chunks that a model may be ahead of a client that reads slowly
STALLED = 30.0  # seconds that the model then waits for it; it may hold up everyone else meanwhile
_PATIENCE = 5.0  # seconds to wait at shutdown for models to finish the token they are working on


class Answers:
    """The answers in progress."""

    def __init__(self, models: Models, metrics: Metrics) -> None:
        self.models = models
        self.metrics = metrics
        self.inbox = Inbox()
        self._running: set[Answer] = set()
        self._stopped = False

    async def start(
        self,
        request: Request,
        name: str,
        begin: Begin,
        *,
        keep_alive: float | None = None,
        context: int | None = None,
    ) -> Answer:
        """Wait for the model, begin an answer and wait for its first chunk.

        So an error before the first token is raised here, while the response can still have its status.
        Use the answer in a `with` block.

        Args:
            begin: gives the chunks of the answer; runs in the answer's thread.
            keep_alive, context: see `Models.use`.
        """
        if self._stopped:
            raise _stopping()
        answer = Answer(self, name, begin, keep_alive, context)
        answer.run(request)
        self._running.add(answer)
        try:
            await answer.wait_for_first()
        except BaseException:
            answer.cancel(ClientGone())
            raise
        return answer

    async def call(
        self,
        request: Request,
        name: str,
        work: Callable[[Model], T],
        *,
        keep_alive: float | None = None,
        context: int | None = None,
    ) -> T:
        """Wait for the model, and for what `work` makes of it in a thread. For what is not streamed.

        (A thread of the event loop's pool would do, but there are few of them, and all requests that wait
        for their turn would hold one.)
        """
        results: list[T] = []

        def begin(model: Model) -> Generator[Chunk]:
            results.append(work(model))
            yield Chunk()

        with await self.start(request, name, begin, keep_alive=keep_alive, context=context):
            return results[0]

    def ended(self, answer: Answer) -> None:
        self._running.discard(answer)

    def stop(self) -> None:
        """Cancel what runs, refuse what comes."""
        self._stopped = True
        for answer in [*self._running]:
            answer.cancel(_stopping())

    async def close(self) -> None:
        """Stop, and wait a few seconds for the threads to end."""
        self.stop()
        deadline = time.monotonic() + _PATIENCE
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if self._running:
            log.warning("%d answers are still busy in their engine", len(self._running))


class Inbox:
    """What engines push, on its way to the event loop, which is called once for all that has come."""

    def __init__(self) -> None:
        self._items: deque[tuple[Answer, Chunk | Exception]] = deque()
        self._called = False

    def put(self, answer: Answer, item: Chunk | Exception) -> None:
        self._items.append((answer, item))
        if not self._called:
            self._called = True
            if not answer.call(self._empty):
                self._called = False
                while self._items:
                    self._items.popleft()[0].nobody_reads()

    def _empty(self) -> None:
        self._called = False  # first: what comes from here on calls again
        while self._items:
            answer, item = self._items.popleft()
            try:
                answer.take(item)
            except Exception as error:
                log.exception("an answer cannot go on")
                answer.cancel(EngineError(f"the answer broke off: {error}"))


class Answer:
    """One answer: an asynchronous iterator of chunks."""

    def __init__(
        self, answers: Answers, name: str, begin: Begin, keep_alive: float | None, context: int | None
    ) -> None:
        self.started = time.monotonic()
        self.load_seconds = 0.0  # what the answer waited for its turn, and for its model to be loaded
        self._answers = answers
        self._turn = answers.models.use(name, keep_alive=keep_alive, context=context)
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()  # None: the end
        self._room = threading.Semaphore(AHEAD)  # bounds the queue; a thread can wait for it
        self._cancelled = threading.Event()
        self._over = threading.Event()  # cancelled, or pushed to its end
        self._broken: Exception | None = None  # what ended one that is pushed
        self._stall: asyncio.TimerHandle | None = None
        self._metrics: Watch | None = None
        self._first: Chunk | None = None
        self._watch: asyncio.Task[None] | None = None

    def run(self, request: Request) -> None:
        threading.Thread(target=self._produce, name="alight-answer", daemon=True).start()
        self._watch = asyncio.create_task(self._cancel_when_gone(request))

    async def wait_for_first(self) -> None:
        """Wait for the first chunk that says something. Models send empty ones while they read the prompt."""
        self._first = await self._next()
        while self._first == Chunk():
            self._first = await self._next()

    async def collect(self) -> Completion:
        """The whole answer."""
        return Completion.of([chunk async for chunk in self])

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        chunk = self._first
        while chunk is not None:
            yield chunk
            chunk = await self._next()

    def cancel(self, reason: Exception) -> None:
        """End the answer; whoever reads it gets `reason`. After its end this does nothing."""
        self._cancelled.set()
        self._turn.cancel()  # the thread may be waiting for it,
        self._over.set()  # or for the end,
        self._room.release()  # or for room
        self._queue.put_nowait(reason)
        if self._stall:
            self._stall.cancel()
        if self._watch:
            self._watch.cancel()

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel(ClientGone())

    # -- on the event loop -----------------------------------------------------------------------

    async def _next(self) -> Chunk | None:
        item = await self._queue.get()
        self._room.release()
        self._watch_stall()
        if isinstance(item, Exception):
            raise item
        return item

    def _watch_stall(self) -> None:
        """Give the client up if it takes nothing for a while although much waits."""
        if self._stall:
            self._stall.cancel()
            self._stall = None
        if self._queue.qsize() > AHEAD and not self._cancelled.is_set():
            self._stall = self._loop.call_later(STALLED, self._give_up)

    def _give_up(self) -> None:
        while not self._queue.empty():  # it would get the reason behind all that
            self._queue.get_nowait()
        self.cancel(_stalled())

    def take(self, item: Chunk | Exception) -> None:
        """What the engine pushed."""
        if self._over.is_set():
            return
        if isinstance(item, Exception):
            self._broken = item
            self._over.set()
            return
        self._see(item)
        self._queue.put_nowait(item)
        if item.finish_reason:
            self._over.set()
        elif self._stall is None:
            self._watch_stall()

    async def _cancel_when_gone(self, request: Request) -> None:
        # The body has been read, so the only message that can come is that the client hung up.
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.cancel(ClientGone())

    # -- in the thread ---------------------------------------------------------------------------

    def _produce(self) -> None:
        end: Exception | None = None
        try:
            with self._turn as model:
                self.load_seconds = time.monotonic() - self.started
                if not self._cancelled.is_set():
                    self._hand_over(model)
        except CancelledError:
            end = ClientGone()  # whoever cancelled the turn has said why
        except AlightError as error:
            end = error
        except Exception as error:
            log.exception("the engine of %s failed", self._turn.name)
            end = EngineError(f"the engine failed: {type(error).__name__}: {error}")
        self.call(self._queue.put_nowait, end)
        self.call(self._answers.ended, self)

    def _hand_over(self, model: Model) -> None:
        self._metrics = self._answers.metrics.watch(self._turn.model_name, self.started)
        with closing(self._begin(model)) as chunks:
            if isinstance(chunks, PushedChunks):
                chunks.push(partial(self._answers.inbox.put, self))
                self._over.wait()
                if self._broken:
                    raise self._broken
                return
            for chunk in chunks:
                self._see(chunk)
                if not self._room.acquire(timeout=STALLED):
                    raise _stalled()
                if self._cancelled.is_set():
                    return
                self.call(self._queue.put_nowait, chunk)

    def _see(self, chunk: Chunk) -> None:
        assert self._metrics is not None  # set before the first chunk
        self._metrics.see(chunk)
        if chunk.usage:
            self._turn.note(chunk.usage)

    def call(self, function: Callable[..., None], *arguments: object) -> bool:
        """Have it called on the event loop, from any thread; False where that has ended."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            self.nobody_reads()
            return False
        return True

    def nobody_reads(self) -> None:
        """The event loop has ended, and with it everyone who could read this."""
        self._cancelled.set()
        self._over.set()


class StreamedAnswer(Response):
    """A response that is written while the answer comes.

    Args:
        answer: a block around the response; the end of it ends what makes the lines.
        lines: the body, made from the answer's chunks.
        failed: the last line, for an error in the middle: the status has been sent by then.
    """

    def __init__(
        self,
        answer: AbstractContextManager[object],
        lines: AsyncIterator[bytes],
        failed: Callable[[Failure], bytes],
        media_type: str,
    ) -> None:
        self.answer = answer
        self.lines = lines
        self.failed = failed
        self.media_type = media_type
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.answer:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for line in self.lines:
                    await send({"type": "http.response.body", "body": line, "more_body": True})
            except ClientGone:
                return
            except AlightError as error:
                log.warning("an answer broke off: %s", error.message)
                await send(
                    {"type": "http.response.body", "body": self.failed(Failure.of(error)), "more_body": True}
                )
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def to_json(data: dict[str, Any]) -> bytes:
    """One line of JSON. All of it is ASCII: clients (httpx) also split lines at U+0085 and U+2028."""
    return json.dumps(data, separators=(",", ":")).encode()


def _stalled() -> Refused:
    return Refused(408, "the client stopped reading", code="client_stalled")


def _stopping() -> Refused:
    return Refused(503, "the server is shutting down", code="shutting_down")
