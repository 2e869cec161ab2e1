"""Long work behind a request: it runs in a thread and tells its progress in lines, as Ollama does."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from alight.errors import AlightError, EngineError, ModelNotFound
from alight.server.failures import ClientGone
from alight.server.ollama_names import not_found
from alight.server.stream import StreamedAnswer, to_json

log = logging.getLogger(__name__)

_PACE = 0.1  # seconds between two lines about the same file
_AHEAD = 256  # lines that a client may be behind before it misses some about progress


class Tell(Protocol):
    """Tells the client a status. Raises where nobody is left to hear it: then the work should end."""

    def __call__(self, status: str, **fields: Any) -> None: ...


Work = Callable[[Tell], None]


async def respond(request: Request, work: Work, *, stream: bool | None) -> Response:
    """Do the work and answer with its lines, or with the last one.

    An error before the first line has its own HTTP status; after it, it is a line.
    """
    job = Job(work)
    job.run(request)
    try:
        first = await job.next()
    except BaseException:
        job.cancel()
        raise
    if stream is not False:
        return StreamedAnswer(
            job, _lines(job, first), lambda failure: _line(failure.ollama()), "application/x-ndjson"
        )
    with job:
        last = first or {}
        while line := await job.next():
            last = line
    return JSONResponse(last)


async def _lines(job: Job, line: dict[str, Any] | None) -> AsyncIterator[bytes]:
    while line:
        yield _line(line)
        line = await job.next()


def _line(data: dict[str, Any]) -> bytes:
    return to_json(data) + b"\n"


class Job:
    """Work in a thread. It ends when its client goes away, the next time that it tells something."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()  # None: the end
        self._cancelled = threading.Event()
        self._watch: asyncio.Task[None] | None = None

    def run(self, request: Request) -> None:
        threading.Thread(target=self._do, name="alight-job", daemon=True).start()
        self._watch = asyncio.create_task(self._cancel_when_gone(request))

    async def next(self) -> dict[str, Any] | None:
        """The next line; None after the last one."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self._cancelled.set()
        if self._watch:
            self._watch.cancel()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def _cancel_when_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(ClientGone())

    # -- in the thread ---------------------------------------------------------------------------

    def _do(self) -> None:
        end: Exception | None = None
        try:
            self._work(self._tell)
            self._tell("success")
        except ClientGone:
            log.info("a client went away; what it asked for was stopped")
        except ModelNotFound as error:
            end = not_found(error)
        except AlightError as error:
            end = error
        except Exception as error:
            log.exception("a job failed")
            end = EngineError(f"it failed: {type(error).__name__}: {error}")
        self._put(end)

    def _tell(self, status: str, **fields: Any) -> None:
        if self._cancelled.is_set():
            raise ClientGone
        if "completed" not in fields or self._queue.qsize() < _AHEAD:
            self._put({"status": status, **fields})

    def _put(self, item: dict[str, Any] | Exception | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the event loop has ended, and with it everyone who could read this
            self._cancelled.set()


class Paced:
    """A progress callback for files, `(what, done, total)`, that tells each one's state a few times a second."""

    def __init__(self, tell: Tell, digests: dict[str, str] | None = None) -> None:
        self._tell = tell
        self._digests = digests or {}
        self._last: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done != total and now - self._last.get(what, -_PACE) < _PACE:
            return
        self._last[what] = now
        digest = self._digests.get(what, what)
        self._tell(f"pulling {digest}", digest=digest, total=total or done, completed=done)
