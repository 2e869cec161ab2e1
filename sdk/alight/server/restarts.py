"""A model whose process may crash: it is started again, and who has got nothing yet does not notice."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from alight.errors import EngineCrashed, EngineError
from alight.pushed import Cancel, Deliver, PushedChunks
from alight.server.worker_model import WorkerModel
from alight.target import Chunk, Model, Prompt, Sampling, Scores

if TYPE_CHECKING:
    from alight.target import FloatArray

log = logging.getLogger(__name__)

T = TypeVar("T")

_AT_ONCE = 3  # crashes in a row after which the next start has to wait
_LONGEST = 60.0  # seconds


class Crashes:
    """How often a model's process crashed, and whether it may be started (again) now.

    After three crashes without an answer between them, a start is refused for a second, then two, four, …
    """

    def __init__(self, name: str) -> None:
        self.total = 0
        self._name = name
        self._in_a_row = 0
        self._not_before = 0.0  # monotonic
        self._last = ""

    def note(self, crash: EngineCrashed) -> None:
        self.total += 1
        self._in_a_row += 1
        self._last = crash.message
        if self._in_a_row >= _AT_ONCE:
            pause = min(2.0 ** (self._in_a_row - _AT_ONCE), _LONGEST)
            self._not_before = time.monotonic() + pause

    def note_answer(self) -> None:
        self._in_a_row = 0
        self._not_before = 0.0

    def check(self) -> None:
        """Raise EngineCrashed where it is too early to start the process again."""
        wait = self._not_before - time.monotonic()
        if wait > 0:
            raise EngineCrashed(
                f"model {self._name!r} crashed {self._in_a_row} times in a row, the last time because "
                f"{self._last}",
                hint=f"It is tried again after {wait:.0f} seconds. The server's log has more.",
                retry_after=wait,
            )


class RestartingModel(Model):
    """A model in a worker process that is started again when it has crashed and is needed.

    A request whose worker crashes before the first token is run once more; one that has sent some already
    is an EngineCrashed. Call `load` before anything else.

    Args:
        start: gives a new worker that has not loaded yet; it is to tell crashes to its argument.
        crashes: the model's crashes so far.
        on_crash: called after each crash, from a thread of the worker.
        make_room: a block around each start after a crash; it raises DoesNotFit where others have taken the
            memory meanwhile.
    """

    def __init__(
        self,
        start: Callable[[Callable[[EngineCrashed], None]], WorkerModel],
        crashes: Crashes,
        on_crash: Callable[[], None],
        make_room: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._start = start
        self._crashes = crashes
        self._on_crash = on_crash
        self._make_room = make_room
        self._lock = threading.Lock()  # held while a worker loads, so that two requests start one
        self._worker: WorkerModel | None = None
        self._closed = False

    def load(self) -> None:
        """Start the worker and wait until it has loaded the model.

        Raises:
            What loading raises. EngineCrashed: it crashed, twice.
        """
        with self._lock:
            try:
                worker = self._launch()
            except EngineCrashed:
                worker = self._launch()
            self.info, self.template = worker.info, worker.template

    @property
    def alive(self) -> bool:
        return self._worker is not None and self._worker.alive

    @property
    def memory(self) -> int:
        """Bytes that the process has now."""
        return self._worker.memory if self._worker else 0

    @property
    def pid(self) -> int | None:
        return self._worker.pid if self._worker and self._worker.alive else None

    # -- the interface of Model ------------------------------------------------------------------

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk]:
        def run() -> Generator[Chunk]:
            return self._living().generate(prompt, sampling)

        return PushedChunks(lambda deliver: _Retried(run, self._crashes.note_answer, deliver).begin())

    def score(self, tokens: Sequence[int], *, distribution: bool = False, top: int = 0) -> Scores:
        return self._answer(lambda worker: worker.score(tokens, distribution=distribution, top=top))

    def embed(self, texts: Sequence[str], *, pooling: str = "") -> FloatArray:
        return self._answer(lambda worker: worker.embed(texts, pooling=pooling))

    def rerank(self, query: str, documents: Sequence[str]) -> list[float]:
        return self._answer(lambda worker: worker.rerank(query, documents))

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        return self._retried(lambda worker: worker.tokenize(text, bos=bos, special=special))

    def prompt_tokens(self, pieces: Sequence[str | bytes]) -> list[int | bytes]:
        return self._retried(lambda worker: worker.prompt_tokens(pieces))

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        return self._retried(lambda worker: worker.detokenize(tokens, special=special))

    def metrics(self) -> dict[str, float]:
        return self._worker.metrics() if self._worker and self._worker.alive else {}

    def close(self) -> None:
        self._closed = True
        if self._worker:  # may be loading: that ends with an error then
            self._worker.close()

    # -- inside ----------------------------------------------------------------------------------

    def _answer(self, call: Callable[[WorkerModel], T]) -> T:
        result = self._retried(call)
        self._crashes.note_answer()
        return result

    def _retried(self, call: Callable[[WorkerModel], T]) -> T:
        try:
            return call(self._living())
        except EngineCrashed:
            return call(self._living())

    def _living(self) -> WorkerModel:
        with self._lock:
            if self._closed or self._worker is None:
                raise EngineError("the model is closed", hint="Load it again.")
            if self._worker.alive:
                return self._worker
            self._crashes.check()
            with self._make_room():
                return self._launch()

    def _launch(self) -> WorkerModel:
        self._crashes.check()
        worker = self._worker = self._start(self._note_crash)
        if self._closed:  # just now: whoever closed us did not see this worker
            worker.close()
        worker.load()
        return worker

    def _note_crash(self, crash: EngineCrashed) -> None:
        self._crashes.note(crash)
        self._on_crash()


class _Retried:
    """One generation, which is run again if its worker crashes before the first token."""

    def __init__(
        self, run: Callable[[], Generator[Chunk]], answered: Callable[[], None], deliver: Deliver
    ) -> None:
        self._run = run
        self._answered = answered
        self._deliver = deliver
        self._chunks: Generator[Chunk] | None = None
        self._said = False
        self._tries = 0
        self._cancelled = False

    def begin(self) -> Cancel:
        """Raises what beginning raises."""
        try:
            self._try()
        except EngineCrashed:
            if self._tries > 1:
                raise
            self._try()
        return self._cancel

    def _try(self) -> None:
        self._tries += 1
        if self._cancelled:
            return
        chunks = self._chunks = self._run()
        assert isinstance(chunks, PushedChunks)
        if self._cancelled:  # meanwhile
            chunks.close()
        chunks.push(self._take)

    def _take(self, item: Chunk | Exception) -> None:
        if isinstance(item, EngineCrashed) and not self._said and self._tries < 2:
            log.info("a request is run again, since its worker crashed before the first token")
            # Starting a worker takes a while, and this is the thread that the old one's replies came by.
            try:
                threading.Thread(target=self._try_again, daemon=True).start()
                return
            except RuntimeError:  # no thread is left
                pass
        if isinstance(item, Chunk):
            self._said = self._said or bool(item.text or item.tokens)
            if item.finish_reason:
                self._answered()
        self._deliver(item)

    def _try_again(self) -> None:
        try:
            self._try()
        except Exception as error:
            self._deliver(error)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._chunks:
            self._chunks.close()
