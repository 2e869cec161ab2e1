"""Continuous batching over a Backend: one thread that gives every running request its next token, step by step.

A step: drop what was cancelled; admit waiting requests; read a piece of the oldest unread prompt (in pieces, so that
a long one does not stall the others); decode one token of all the others together; sample; deliver.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from alight.errors import AlightError, EngineError
from alight.target import FinishReason
from alight_targets.common.backend import Backend
from alight_targets.common.request import Request
from alight_targets.common.sequences import Sequences
from alight_targets.common.tokenizer import Tokenizer

if TYPE_CHECKING:
    from alight.target import FloatArray

log = logging.getLogger("alight.engine")

T = TypeVar("T")

CHUNK = 512  # prompt tokens per step
CHUNK_AMONG_OTHERS = 96  # while others decode: bounds how long they wait
WORTH_WAITING_FOR = 64  # tokens of a common beginning that another request is just reading


class Scheduler:
    """Runs requests on one backend, in a thread of its own.

    Args:
        open_backend: makes the backend; called on the scheduler's thread, the only one that uses it.
        slots: requests decoded at once; more wait.

    Attributes:
        work: grows with every call of the backend, so that others notice when one hangs.
    """

    def __init__(self, open_backend: Callable[[], Backend], tokenizer: Tokenizer, *, slots: int) -> None:
        self._tokenizer = tokenizer
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # oldest first
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self.work = 0
        self._counters: dict[str, float] = dict.fromkeys(
            ("steps", "decode_seconds", "step_seconds", "prompt_tokens", "cached_tokens", "generated_tokens"),
            0,
        )
        self._thread = threading.Thread(target=self._loop, name="alight-engine", daemon=True)
        self._thread.start()
        try:
            self.backend = self.call(open_backend)
        except BaseException:
            self.close()
            raise
        self._slots = min(slots, self.backend.slots)
        self._sequences = Sequences(self.backend)

    # -- called from any thread ------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        with self._wake:
            self._check_open()
            self._waiting.append(request)
            self._wake.notify()

    def call(self, job: Callable[[], T]) -> T:
        """Run something on the scheduler's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            self._check_open()
            self._jobs.append(run)
            self._wake.notify()
        return future.result()

    def logits(self, tokens: list[int]) -> Iterator[FloatArray]:
        """Those of the backend, from a job."""
        for block in self.backend.logits(tokens):
            self.work += 1
            yield block

    def close(self) -> None:
        """Stop after the step in progress; requests that are not finished get an EngineError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it can still run something; False after `close`, and after a failure that it cannot recover from."""
        return self._thread.is_alive() and not self._closed

    def gauges(self) -> dict[str, float]:
        return {
            **{
                f"{name}_total": value for name, value in self._counters.items()
            },  # as Prometheus names counters
            "evictions_total": self._sequences.evictions,
            "running": len(self._running),
            "waiting": len(self._waiting),
            "kv_cells": self.backend.context * self.backend.slots,
            "kv_cells_used": self._sequences.tokens,
        }

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the model is closed", hint="Load it again.")

    # -- the scheduler's thread ------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._jobs or self._waiting or self._running):
                    self._wake.wait()
                if self._closed:
                    break
            while self._jobs:
                self._jobs.popleft()()
            if self._waiting or self._running:
                started = time.perf_counter()
                try:
                    self._step()
                except Exception as error:
                    log.exception("the engine failed; its requests are given up")
                    self._recover(error)
                self._counters["steps"] += 1
                self._counters["step_seconds"] += time.perf_counter() - started
        self._give_up(EngineError("the model was closed", hint="Load it again."))
        while self._jobs:
            self._jobs.popleft()()
        if hasattr(self, "backend"):  # it did open
            self.backend.close()

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        decoding = [request for request in self._running if request.decoding]
        reading = next((request for request in self._running if not request.decoding), None)
        if reading:
            self._read(reading, CHUNK_AMONG_OTHERS if decoding else CHUNK)
        if decoding:
            self._decode(decoding)

    def _drop_cancelled(self) -> None:
        for request in [r for r in self._running if r.cancelled]:
            self._finish(request)
        for request in [r for r in list(self._waiting) if r.cancelled]:
            self._waiting.remove(request)

    def _admit(self) -> None:
        for request in list(self._waiting):
            if len(self._running) >= self._slots:
                return
            if not self._is_being_read(request):
                self._waiting.remove(request)
                self._start(request)

    def _is_being_read(self, request: Request) -> bool:
        """Is another request just reading the same beginning? Then it is cheaper to wait for it."""
        if not self._sequences.copies:
            return False
        have = self._sequences.known(request) + WORTH_WAITING_FOR
        return any(
            request.tokens[:have] == other.tokens[:have] and len(request.tokens) > have
            for other in self._running
            if not other.made and other.sampling.adapters == request.sampling.adapters
        )

    def _start(self, request: Request) -> None:
        try:
            self._sequences.begin(request)
        except AlightError as error:  # only this request's trouble
            request.tell(error)
            return
        self._running.append(request)
        if not request.made:
            request.cached = request.kv
            self._counters["cached_tokens"] += request.kv
            self._counters["prompt_tokens"] += request.prompt

    def _read(self, request: Request, room: int) -> None:
        """The next tokens of a prompt."""
        part = request.tokens[request.kv : request.kv + room]
        logits = self._timed(lambda: self.backend.extend(request.sequence, part))
        request.kv += len(part)
        if request.kv == len(request.tokens):
            self._choose(request, logits)

    def _decode(self, requests: list[Request]) -> None:
        rows = self._timed(
            lambda: self.backend.decode([r.sequence for r in requests], [r.tokens[-1] for r in requests])
        )
        for request, logits in zip(requests, rows, strict=True):
            request.kv += 1
            self._choose(request, logits)

    def _timed(self, work: Callable[[], FloatArray]) -> FloatArray:
        started = time.perf_counter()
        logits = work()
        self._counters["decode_seconds"] += time.perf_counter() - started
        self.work += 1
        return logits

    def _choose(self, request: Request, logits: FloatArray) -> None:
        """Sample a request's next token, and end the request where it ends."""
        if not request.first_token:
            request.first_token = time.perf_counter()
        try:
            token = request.sampler.sample(logits, request.tokens)
            request.tokens.append(token)
            request.made += 1
            self._counters["generated_tokens"] += 1
            reason = self._deliver(request, token, logits)
        except AlightError as error:  # only this request's trouble
            request.tell(error)
            self._finish(request)
            return
        if reason:
            request.end(reason)
            self._finish(request)

    def _deliver(self, request: Request, token: int, logits: FloatArray) -> FinishReason | None:
        """Send a token's text on its way; returns why the answer ends with it, if it does."""
        if token in self._tokenizer.ends:
            return "stop"
        wants = request.sampling.logprobs is not None
        logprob = request.sampler.logprob(logits, token) if wants else None
        piece = self._tokenizer.piece(token, special=token in request.shown_special)
        request.say(request.stream.feed(piece), token, logprob)
        if request.stream.stopped or request.sampler.finished:
            return "stop"
        if request.made >= request.limit:
            return "length"
        if len(request.tokens) >= self.backend.context:
            if not request.shift:
                return "length"
            self._shift(request)
        return None

    def _shift(self, request: Request) -> None:
        """Drop the older half of a conversation that fills the context, all but its first tokens; read the rest again,
        since its positions have changed."""
        keep = min(request.prompt, 4)
        request.tokens = request.tokens[:keep] + request.tokens[-(self.backend.context // 2) :]
        self._sequences.restart(request, keep)

    def _finish(self, request: Request) -> None:
        """Take a request out; what it leaves in the KV cache may serve others."""
        self._running.remove(request)
        self._sequences.keep(request)

    # -- when things go wrong --------------------------------------------------------------------

    def _recover(self, error: Exception) -> None:
        """After a failure: give up what runs, and begin anew; close where that fails, too."""
        failure = error if isinstance(error, AlightError) else EngineError(f"the engine failed: {error}")
        for request in self._running:
            request.tell(failure)
        self._running.clear()
        try:
            self._sequences.clear()
        except Exception:
            log.exception("the engine cannot go on")
            with self._wake:
                self._closed = True

    def _give_up(self, error: Exception) -> None:
        with self._wake:  # none may come in between and be lost
            requests = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for request in requests:
            request.tell(error)
