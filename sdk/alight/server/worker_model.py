"""A model in a process of its own: the server's side of it (the other one is worker.py)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import psutil

from alight.artifact import Artifact
from alight.errors import EngineCrashed, EngineError
from alight.pushed import Cancel, Deliver, PushedChunks
from alight.server import worker_protocol as protocol
from alight.server.watchdog import PATIENCE, Watchdog
from alight.server.worker_protocol import Channel, Header
from alight.target import Chunk, LoadOptions, Model, Prompt, Sampling, Scores

if TYPE_CHECKING:
    from alight.target import FloatArray

log = logging.getLogger(__name__)

_GRACE = 6.0  # seconds that a worker gets to end; it gives its engine a little less
_LINE = 2000  # bytes of a line in the log

# The kernel ends a worker when the *thread* that started it ends (see worker._end_with), so one thread that
# lasts as long as this process starts them all.
_spawner = ThreadPoolExecutor(1, thread_name_prefix="alight-spawner")

_Reply: TypeAlias = "tuple[Header, bytearray] | None"  # None: the process has ended


class WorkerModel(Model):
    """A model that a process of its own loads and runs. Call `load` before anything else.

    Args:
        artifact, options, target: as for `alight.api.load_artifact`.
        on_crash: called once, from another thread, if the process ends although nobody closed the model.
        patience: seconds without progress after which the process counts as hung, and is ended.

    Raises:
        EngineError: the process does not start.
    """

    def __init__(
        self,
        artifact: Artifact,
        options: LoadOptions | None = None,
        *,
        target: str = "auto",
        on_crash: Callable[[EngineCrashed], None] = lambda _: None,
        patience: float = PATIENCE,
    ) -> None:
        self.name = artifact.name
        self._artifact = artifact
        self._options = options or LoadOptions()
        self._target = target
        self._on_crash = on_crash
        self._numbers = itertools.count()
        self._requests: dict[int, Callable[[_Reply], None]] = {}
        self._watched: set[int] = set()  # those of them that the watchdog knows of
        self._lock = threading.Lock()  # guards _requests, _closing and _crash
        self._closing = False
        self._crash: str | None = None  # how the process ended by itself
        self._hung = ""  # how it was ended because it hung
        self._patience = patience
        self._watchdog = Watchdog(patience, self._end_hung)
        self._process, self._channel = _spawner.submit(_start).result()
        self._last_lines: deque[str] = deque(maxlen=40)
        self._errors = threading.Thread(target=self._read_errors, name="alight-worker-log", daemon=True)
        self._errors.start()
        self._reader = threading.Thread(target=self._read, name="alight-worker-reader", daemon=True)
        self._reader.start()

    def load(self) -> None:
        """Wait until the model is loaded. The process ends if that fails.

        Raises:
            What the target raises: DoesNotFit, InvalidModelFile, TargetUnavailable, …; EngineCrashed.
        """
        try:
            about, _ = self._ask(
                "load",
                artifact=protocol.artifact_to_json(self._artifact),
                options=protocol.options_to_json(self._options),
                target=self._target,
            )
        except BaseException:
            self.close()
            raise
        self.info = protocol.info_from_json(about["info"])
        self.template = protocol.template_from_json(about["template"])

    @property
    def alive(self) -> bool:
        """Whether the process runs and nobody closed it."""
        return not self._closing and self._crash is None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def memory(self) -> int:
        """Bytes of memory that the process has now (its resident set, mapped weights included)."""
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss) if self.alive else 0
        except psutil.Error:
            return 0

    # -- the interface of Model ------------------------------------------------------------------

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk]:
        told, images = protocol.prompt_to_json(prompt)
        options = protocol.options_to_json(sampling or Sampling())

        def begin(deliver: Deliver) -> Cancel:
            return self._begin(deliver, images, prompt=told, sampling=options)

        return PushedChunks(begin)

    def _begin(self, deliver: Deliver, payload: bytes, **fields: Any) -> Cancel:
        def take(reply: _Reply) -> None:
            if reply is None:
                deliver(self._gone())
                return
            item = protocol.said_from_json(reply[0]["said"])
            if not isinstance(item, Chunk) or item.finish_reason:
                self._forget(number)
            deliver(item)

        number = self._enter(take)
        try:
            self._tell(number, "generate", payload, **fields)
        except BaseException:  # what was asked for cannot be told
            self._forget(number)
            raise

        def cancel() -> None:
            if self._forget(number):
                self._tell(number, "cancel")

        return cancel

    def score(self, tokens: Sequence[int], *, distribution: bool = False, top: int = 0) -> Scores:
        scores: Scores = self._call("score", _integers(tokens), distribution=distribution, top=top)
        return scores

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        ids: list[int] = self._call("tokenize", text, bos=bos, special=special)
        return ids

    def prompt_tokens(self, pieces: Sequence[str | bytes]) -> list[int | bytes]:
        if not all(isinstance(piece, str) for piece in pieces):
            return super().prompt_tokens(pieces)  # images stay here until they are needed
        ids: list[int | bytes] = self._call("prompt_tokens", list(pieces))  # one round trip for all of them
        return ids

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        data: bytes = self._call("detokenize", _integers(tokens), special=special)
        return data

    def embed(self, texts: Sequence[str], *, pooling: str = "") -> FloatArray:
        vectors: FloatArray = self._call("embed", list(texts), pooling=pooling)
        return vectors

    def rerank(self, query: str, documents: Sequence[str]) -> list[float]:
        scores: list[float] = self._call("rerank", query, list(documents))
        return scores

    def metrics(self) -> dict[str, float]:
        figures: dict[str, float] = self._call("metrics", timeout=2.0)  # a scrape does not wait for long
        return figures

    def close(self) -> None:
        with self._lock:
            self._closing = True
        if not self._channel.hang_up(timeout=1.0):
            self._process.kill()
            self._channel.hang_up(timeout=1.0)
        if threading.current_thread() is self._reader:  # on_crash led here
            return
        self._reader.join(_GRACE)
        if self._reader.is_alive():
            log.warning("the worker of %s does not end, so it is killed", self.name)
            self._process.kill()
            self._reader.join()

    # -- requests --------------------------------------------------------------------------------

    def _call(self, method: str, *arguments: Any, timeout: float | None = None, **options: Any) -> Any:
        header, payload = self._ask(method, timeout=timeout, arguments=arguments, options=options)
        return protocol.result_from_json(header, payload)

    def _ask(self, call: str, *, timeout: float | None = None, **fields: Any) -> tuple[Header, bytearray]:
        """Send a request and wait for its reply."""
        replies: queue.SimpleQueue[_Reply] = queue.SimpleQueue()
        number = self._enter(replies.put, watched=call != "load")  # that may take as long as a disk is slow
        try:
            self._tell(number, call, **fields)
            reply = replies.get(timeout=timeout)
        except queue.Empty:
            raise EngineError(f"the worker of {self.name!r} does not answer") from None
        finally:
            self._forget(number)
        if reply is None:
            raise self._gone()
        if "error" in reply[0]:
            raise protocol.error_from_json(reply[0]["error"])
        return reply

    def _enter(self, take: Callable[[_Reply], None], *, watched: bool = True) -> int:
        """A new request's number; `take` gets its replies, on the reader's thread."""
        with self._lock:
            if not self.alive:
                raise self._gone()
            number = next(self._numbers)
            self._requests[number] = take
        if watched:
            self._watched.add(number)
            self._watchdog.begin()
        return number

    def _forget(self, number: int) -> bool:
        """The request has ended; False if that was known."""
        known = self._requests.pop(number, None) is not None
        if known and number in self._watched:
            self._watched.discard(number)
            self._watchdog.end()
        return known

    def _tell(self, number: int, call: str, payload: bytes = b"", **fields: Any) -> None:
        # Where the process is gone, the reader finds that out too, and tells all who wait for a reply.
        with contextlib.suppress(OSError):
            self._channel.send({"id": number, "call": call, **fields}, payload)

    def _gone(self) -> EngineError:
        if self._crash is None:
            return EngineError(f"model {self.name!r} is closed", hint="Load it again.")
        return EngineCrashed(
            f"the process of model {self.name!r} {self._crash}", hint="Send the request again."
        )

    # -- the threads that read -------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while frame := self._channel.receive():
                header, _ = frame
                if header["id"] == protocol.CHUNKS:
                    for number, said in header["chunks"]:
                        if take := self._requests.get(number):
                            take(({"said": said}, frame[1]))
                elif take := self._requests.get(header["id"]):
                    take(frame)
                elif header["id"] == protocol.BEAT:
                    self._watchdog.beat(header["progress"], header["busy"])
                elif header["id"] == protocol.LOG:
                    logger = logging.getLogger(header["name"])
                    logger.log(header["level"], "%s: %s", self.name, header["text"])
        except Exception:
            log.exception("the worker of %s talks nonsense, so it is ended", self.name)
        self._end()

    def _end(self) -> None:
        """The process has ended, or does now: reap it and tell everyone who waits for it."""
        self._watchdog.stop()
        # With it goes what it started. It leads a group of its own, and its number is not free yet.
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        code = self._process.wait()
        self._errors.join(1.0)
        with self._lock:
            if not self._closing:
                self._crash = self._hung or _how(code, self._last_lines)
            waiting = [*self._requests.values()]
        try:
            if self._crash is not None:
                self._tell_crash()  # first, so that who tries again finds it counted
        finally:
            for take in waiting:
                try:
                    take(None)
                except Exception:
                    log.exception("nobody could be told that the worker of %s has ended", self.name)
            self._channel.hang_up(timeout=1.0)
            self._channel.close()

    def _end_hung(self) -> None:
        self._hung = f"made no progress for {self._patience:g} seconds, so it was ended"
        self._process.kill()  # the reader does the rest

    def _tell_crash(self) -> None:
        error = self._gone()
        assert isinstance(error, EngineCrashed)
        log.warning("%s", error.message)
        self._on_crash(error)

    def _read_errors(self) -> None:
        stream: IO[bytes] = self._process.stderr  # type: ignore[assignment]
        with stream:
            while line := stream.readline(_LINE):
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._last_lines.append(text)
                    log.info("%s: %s", self.name, text)


def _start() -> tuple[subprocess.Popen[bytes], Channel]:
    """A new worker process, and the channel to it."""
    level = logging.getLogger("alight").getEffectiveLevel()
    # -P: no module of the working directory is taken for one of the library's.
    command = [sys.executable, "-P", "-m", "alight.server.worker", str(os.getpid()), str(level)]
    paths = os.pathsep.join(path for path in sys.path if path)  # it finds the same targets as we do
    to_worker, from_worker = os.pipe(), os.pipe()
    try:
        process = subprocess.Popen(
            command,
            stdin=to_worker[0],
            stdout=from_worker[1],
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for the server
            env={**os.environ, "PYTHONPATH": paths},
        )
    except OSError as error:
        os.close(to_worker[1])
        os.close(from_worker[0])
        raise EngineError(f"cannot start a process for the model: {error.strerror}") from error
    finally:
        os.close(to_worker[0])
        os.close(from_worker[1])
    return process, Channel(from_worker[0], to_worker[1])


def _how(code: int, lines: Sequence[str]) -> str:
    """How a process ended, in words, with the last thing that its engine said."""
    if code >= 0:
        ended = f"ended with exit code {code}"
    else:
        try:
            ended = f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            ended = f"was ended by signal {-code}"
    if -code == getattr(signal, "SIGKILL", None):
        return ended + " (somebody killed it, or the memory ran out)"
    # Python's own report of a crash comes after what the engine said, and is in the log.
    said = list(itertools.takewhile(lambda line: not line.startswith("Fatal Python error"), lines))
    return f"{ended}: {said[-1][:300]}" if said else ended


def _integers(tokens: Sequence[int]) -> list[int]:
    return [operator.index(token) for token in tokens]  # also NumPy's, which JSON does not know
