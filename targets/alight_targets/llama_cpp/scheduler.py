"""Continuous batching: one thread that gives every running request its next token, step by step.

A step: admit waiting requests; put the next token of each running one into the batch; fill the rest with
pieces of prompts (chunked prefill, so that a long prompt does not stall the others); decode; sample;
deliver. Finished sequences stay in the KV cache for whoever begins with the same tokens, until their
cells are needed; when even that is not enough, the youngest request is preempted and reads its tokens
again later. The idea is Orca's and vLLM's; the cache is llama.cpp's, shared cell by cell.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

from alight.errors import AlightError, EngineError
from alight.target import FinishReason
from alight_targets.common.tokens import common_length
from alight_targets.llama_cpp.cache import Cache
from alight_targets.llama_cpp.jobs import Jobs
from alight_targets.llama_cpp.native import NativeModel
from alight_targets.llama_cpp.request import Request

log = logging.getLogger("alight.llama_cpp")

T = TypeVar("T")

CHUNK_AMONG_OTHERS = 96  # prompt tokens per step while others decode: bounds how long they wait
WORTH_WAITING_FOR = 64  # tokens of a common beginning that another request is just reading


class Drafter(Protocol):
    """Guesses the next tokens of requests (speculative decoding)."""

    def propose(self, requests: Sequence[Request]) -> None: ...
    def forget(self, request: Request) -> None: ...


class Scheduler:
    """Runs requests on one context, in a thread of its own.

    Args:
        open_cache: makes the KV cache; called on the engine's thread, where all of llama.cpp runs: OpenMP keeps
            a team of threads for each thread that computes, and slows down when there are several.
        limit: tokens of one conversation at most.
        slots: requests decoded at once; more wait.
        drafter: guesses tokens ahead.
    """

    def __init__(
        self,
        model: NativeModel,
        open_cache: Callable[[], Cache],
        *,
        limit: int,
        slots: int,
        drafter: Drafter | None = None,
    ) -> None:
        self._model = model
        self._limit = limit
        self._slots = slots
        self._drafter = drafter
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # oldest first
        self._turn = 0  # which set of adapters goes next
        self._jobs = Jobs()
        self._wake = threading.Condition()
        self._closed = False
        self._cells_used = 0
        self._crowded = False  # a request was preempted; none is admitted until another has finished
        self.counters: dict[str, float] = dict.fromkeys(
            ("steps", "decode_seconds", "step_seconds", "prompt_tokens", "cached_tokens", "generated_tokens",
             "drafted_tokens", "accepted_tokens", "preemptions"), 0,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._loop, name="alight-engine", daemon=True)
        self._thread.start()
        try:
            self._cache = self.call(open_cache)
        except BaseException:
            self.close()
            raise

    # -- called from any thread ------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        with self._wake:
            self._check_open()
            self._waiting.append(request)
            self._wake.notify()

    def call(self, job: Callable[[], T]) -> T:
        """Run something on the engine's thread, between two steps."""
        with self._wake:
            self._check_open()
            future = self._jobs.add(job)
            self._wake.notify()
        return future.result()

    def work(self, steps: Generator[None, None, T]) -> T:
        """Run something long there: one step of it (to its next `yield`) after each of the requests."""
        with self._wake:
            self._check_open()
            future = self._jobs.add_steps(steps)
            self._wake.notify()
        return future.result()

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
        counted = {**self.counters, "evictions": self._cache.evictions, "cache_moves": self._cache.moves}
        return {
            **{f"{name}_total": value for name, value in counted.items()},  # as Prometheus names counters
            "running": len(self._running),
            "waiting": len(self._waiting),
            "kv_cells": self._cache.context.context,
            "kv_cells_used": self._cells_used,
        }

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the model is closed", hint="Load it again.")

    # -- the engine's thread ---------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._jobs or self._waiting or self._running):
                    self._wake.wait()
                if self._closed:
                    break
            self._jobs.run()
            if self._waiting or self._running:
                started = time.perf_counter()
                try:
                    self._step()
                    self._cells_used = self._cache.used(self._running)
                except Exception as error:
                    log.exception("the engine failed; its requests are given up")
                    self._recover(error)
                self.counters["steps"] += 1
                self.counters["step_seconds"] += time.perf_counter() - started
        closed = EngineError("the model was closed", hint="Load it again.")
        self._give_up(closed)
        self._jobs.end(closed)

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        group = self._next_group()
        if self._drafter:
            self._drafter.propose([r for r in group if r.decoding])
            for request in group:
                del request.draft[max(0, self._limit - len(request.tokens)) :]
        self._cache.let_grow(self._running)
        while not self._decode(group):
            self._make_room()
            group = [r for r in group if r.sequence >= 0]

    def _drop_cancelled(self) -> None:
        for request in [r for r in self._running if r.cancelled]:
            self._finish(request)
        for request in [r for r in list(self._waiting) if r.cancelled]:
            self._waiting.remove(request)
            request.sampler.close()

    def _admit(self) -> None:
        free = self._slots - len(self._running)
        if not self._waiting or free <= 0 or (self._crowded and self._running):
            return
        arriving = list(self._waiting)[:free]  # no others: way is made for these
        if not self._cache.make_way(self._running, arriving):
            if self._running:
                return
            raise EngineError("there is no memory for the KV cache", hint="Load it with a smaller context.")
        for request in arriving:
            if not self._is_being_read(request):
                self._start(request)
                self._waiting.remove(request)
        self._cache.close_ranks(self._running)

    def _is_being_read(self, request: Request) -> bool:
        """Is another request just reading the same beginning? Then it is cheaper to wait for it."""
        have = self._cache.known(request.tokens, request.adapters) + WORTH_WAITING_FOR
        return any(
            not r.made and r.adapters == request.adapters and common_length(r.tokens, request.tokens) > have
            for r in self._running
            if r.kv < r.prompt - 1
        )

    def _start(self, request: Request) -> None:
        request.kv = self._cache.begin(request, alone=not self._running)
        if not request.made:
            request.cached = request.kv
            self.counters["cached_tokens"] += request.kv
            self.counters["prompt_tokens"] += request.prompt
        self._running.append(request)

    def _next_group(self) -> list[Request]:
        """The running requests of one set of adapters: one decode can apply only one set."""
        kinds = list(dict.fromkeys(r.adapters for r in self._running))
        self._turn = (self._turn + 1) % len(kinds) if kinds else 0
        return [r for r in self._running if r.adapters == kinds[self._turn]] if kinds else []

    def _decode(self, group: list[Request]) -> bool:
        """Build one batch, run it, and deliver. False when the KV cache has no room for it."""
        if not self._read_image(group):
            return False
        if not group:
            return True
        in_order = sorted(group, key=lambda r: r.sequence)  # neighbours run together
        decoding = [r for r in in_order if r.decoding]
        reading = [r for r in group if not r.decoding]  # oldest first
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[bool] = []
        ready: list[
            tuple[Request, int]
        ] = []  # whose next token can be chosen, and its first row in the batch

        def put(request: Request, part: list[int], outputs: bool) -> None:
            tokens.extend(part)
            at = request.position(request.kv)
            positions.extend(range(at, at + len(part)))
            sequences.extend([request.sequence] * len(part))
            wanted.extend([outputs] * len(part))

        for request in decoding:
            ready.append((request, len(tokens)))
            put(request, [request.tokens[-1], *request.draft], outputs=True)
        room = self._cache.context.batch - len(tokens)
        if len(decoding) >= len(reading):
            room = min(room, CHUNK_AMONG_OTHERS)
        read: list[tuple[Request, int]] = []
        for request in reading:
            if room <= 0:
                break
            part = request.next_text(room)
            if not part:  # its next image is read in another step
                continue
            put(request, part, outputs=False)
            room -= len(part)
            read.append((request, len(part)))
            if request.kv + len(part) == len(request.tokens):
                wanted[-1] = True
                ready.append((request, len(tokens) - 1))
        if not tokens:
            return True
        self._cache.context.use_adapters(group[0].adapters)
        started = time.perf_counter()
        done = self._cache.context.decode(tokens, positions, sequences, wanted)
        self.counters["decode_seconds"] += time.perf_counter() - started
        if not done:
            return False
        for request, count in read:
            request.kv += count
            self._cache.note(request)
        try:
            for request, row in ready:
                self._choose(request, row)
        finally:  # who is done has its end, even where another fails
            for request, _ in ready:
                request.hand_over()
        return True

    def _read_image(self, group: list[Request]) -> bool:
        """Let the first request that has come to an image read it, in a decode of its own: the others would
        wait too long for several. False when the KV cache has no room for it."""
        for request in group:
            image = request.next_image() if request.images else None
            if image is None or image.start != request.kv:
                continue
            self._cache.context.use_adapters(request.adapters)
            try:
                if not image.decode(self._cache.context, request.sequence, request.position(image.start)):
                    return False
            except AlightError as error:  # only this request's trouble
                request.tell(error)
                self._finish(request)
                group.remove(request)
                return True
            request.kv = image.end
            self._cache.note(request)
            return True
        return True

    def _choose(self, request: Request, row: int) -> None:
        """Sample a request's next token, and as many of its drafted ones as turn out right."""
        if not request.first_token:
            request.first_token = time.perf_counter()
        draft, request.draft = request.draft, []
        if request.decoding:
            request.kv += 1 + len(draft)
        request.drafted += len(draft)
        for guess in [*draft, None]:
            token = request.sampler.sample(self._cache.context, row)
            row += 1
            request.tokens.append(token)
            request.made += 1
            self.counters["generated_tokens"] += 1
            reason = self._deliver(request, token, row - 1)
            if reason:
                self._count_draft(request, len(draft))
                request.end(reason)
                self._finish(request)
                return
            if token != guess:
                break
            request.accepted += 1
            self.counters["accepted_tokens"] += 1
        self._count_draft(request, len(draft))

    def _count_draft(self, request: Request, drafted: int) -> None:
        """Take guesses that were wrong out of the KV cache again."""
        valid = len(request.tokens) - 1
        if drafted:
            self.counters["drafted_tokens"] += drafted
        if request.kv > valid:
            self._cache.context.forget(request.sequence, request.position(valid))
            request.kv = valid

    def _deliver(self, request: Request, token: int, row: int) -> FinishReason | None:
        """Send a token's text on its way; returns why the answer ends with it, if it does."""
        if self._model.is_end(token):
            return "stop"
        wants = request.sampling.logprobs is not None
        logprob = request.sampler.logprob(self._cache.context, row, token) if wants else None
        shown = token in request.shown_special
        text = request.stream.feed(self._model.piece(token, special=shown))
        request.say(text, token, logprob)
        if request.stream.stopped:
            return "stop"
        if request.made >= request.limit:
            return "length"
        if len(request.tokens) >= self._limit:
            if not request.shift:
                return "length"
            self._shift(request)
        return None

    def _shift(self, request: Request) -> None:
        """Drop the older half of a conversation that fills the context, all but its first tokens.

        The rest is read again rather than moved: its cells may be shared, and every kind of memory can do it.
        """
        keep = min(request.prompt, 4)
        request.tokens = request.tokens[:keep] + request.tokens[-(self._limit // 2) :]
        self._cache.restart(request)

    def _finish(self, request: Request) -> None:
        """Take a request out; what it leaves in the KV cache may serve others."""
        self._running.remove(request)
        self._crowded = False
        request.sampler.close()
        if self._drafter:
            self._drafter.forget(request)
        self._cache.keep(request)

    # -- room in the KV cache --------------------------------------------------------------------

    def _make_room(self) -> None:
        if self._cache.make_room():
            return
        if len(self._running) == 1:
            raise EngineError(
                "the KV cache has no room for a single request", hint="Load it with a larger context."
            )
        self._preempt(self._running[-1])

    def _preempt(self, request: Request) -> None:
        """Send a running request back to wait: it reads all its tokens again when there is room."""
        self._running.remove(request)
        self._cache.release(request)
        if self._drafter:
            self._drafter.forget(request)
        request.sequence, request.kv, request.draft = -1, 0, []
        self._waiting.appendleft(request)
        self.counters["preemptions"] += 1
        self._crowded = True

    def _give_up(self, error: Exception) -> None:
        """Tell all requests that there is no more; what they left in the cache is the caller's to drop."""
        if self._drafter:
            for request in self._running:
                self._drafter.forget(request)
        with self._wake:  # none may come in between and be lost
            requests = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for request in requests:
            request.sampler.close()
            request.tell(error)

    def _recover(self, error: Exception) -> None:
        """After a failure: give its requests up and begin with an empty cache, or close where that fails, too."""
        self._give_up(error)
        try:
            self._cache.reset()
        except Exception:
            log.exception("the engine cannot go on")
            with self._wake:
                self._closed = True
