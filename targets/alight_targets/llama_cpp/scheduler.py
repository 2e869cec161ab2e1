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
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

from alight.errors import EngineError
from alight.target import FinishReason
from alight_targets.llama_cpp.native import NativeContext, NativeModel
from alight_targets.llama_cpp.prefix import PrefixIndex
from alight_targets.llama_cpp.prompt_cache import SHORTEST, PromptCache
from alight_targets.llama_cpp.request import Adapters, Request

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
        limit: tokens of one conversation at most.
        slots: requests decoded at once; more wait.
        sequences: numbers of sequences that the context has; those that no request uses keep old prefixes.
        drafter: guesses tokens ahead. prompts: keeps shared prompts on disk.
    """

    def __init__(
        self,
        model: NativeModel,
        context: NativeContext,
        *,
        limit: int,
        slots: int,
        sequences: int,
        drafter: Drafter | None = None,
        prompts: PromptCache | None = None,
    ) -> None:
        self._model = model
        self._context = context
        self._limit = limit
        self._slots = slots
        self._drafter = drafter
        self._prompts = prompts
        self._shares = not model.recurrent  # recurrent states cannot be cut or shared by position
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # oldest first
        self._free = list(range(sequences))
        self._cached: dict[int, Adapters] = {}  # finished sequences, least recently used first
        self._indexes: dict[Adapters, PrefixIndex] = {}  # keys and values depend on the adapters, too
        self._turn = 0  # which set of adapters goes next
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self.counters: dict[str, float] = dict.fromkeys(
            ("steps", "decode_seconds", "step_seconds", "prompt_tokens", "cached_tokens", "generated_tokens",
             "drafted_tokens", "accepted_tokens", "evictions", "preemptions"), 0,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._loop, name="alight-engine", daemon=True)
        self._thread.start()

    # -- called from any thread ------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        with self._wake:
            if self._closed:
                raise EngineError("the model is closed", hint="Load it again.")
            self._waiting.append(request)
            self._wake.notify()

    def call(self, job: Callable[[], T]) -> T:
        """Run something on the engine's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._closed:
                raise EngineError("the model is closed", hint="Load it again.")
            self._jobs.append(run)
            self._wake.notify()
        return future.result()

    def close(self) -> None:
        """Stop after the step in progress; requests that are not finished get an EngineError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def gauges(self) -> dict[str, float]:
        return {**self.counters, "running": len(self._running), "waiting": len(self._waiting)}

    # -- the engine's thread ---------------------------------------------------------------------

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
                    self._give_up(error)
                self.counters["steps"] += 1
                self.counters["step_seconds"] += time.perf_counter() - started
        self._give_up(EngineError("the model was closed", hint="Load it again."))
        while self._jobs:
            self._jobs.popleft()()

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        group = self._next_group()
        if self._drafter:
            self._drafter.propose([r for r in group if r.decoding])
        while not self._decode(group):
            self._make_room()
            group = [r for r in group if r.sequence >= 0]
        for request in self._waiting:
            request.show_life()

    def _drop_cancelled(self) -> None:
        for request in [r for r in self._running if r.cancelled]:
            self._finish(request)
        for request in [r for r in self._waiting if r.cancelled]:
            self._waiting.remove(request)
            request.sampler.close()

    def _admit(self) -> None:
        for request in list(self._waiting):
            if len(self._running) >= self._slots:
                return
            if not self._is_being_read(request):
                self._waiting.remove(request)
                self._start(request)

    def _is_being_read(self, request: Request) -> bool:
        """Is another request just reading the same beginning? Then it is cheaper to wait for it."""
        if not self._shares:
            return False
        have = self._index(request.adapters).longest(request.tokens)[1] + WORTH_WAITING_FOR
        return any(
            not r.made and r.adapters == request.adapters and _common(r.tokens, request.tokens) > have
            for r in self._running
            if r.kv < r.prompt - 1
        )

    def _start(self, request: Request) -> None:
        """Give a request a sequence, beginning with what the cache has of its tokens."""
        index = self._index(request.adapters)
        owner, length = index.longest(request.tokens[:-1]) if self._shares else (-1, 0)
        if owner in self._cached:
            self._cached[owner] = self._cached.pop(owner)  # now the most recently used
        if not self._free:
            self._evict(keep=owner)
        request.sequence = self._free.pop()
        if length:
            self._context.share(owner, request.sequence, length)
        if self._prompts and not request.adapters:
            length = self._use_disk(self._prompts, request, length)
        if length:
            index.insert(request.sequence, request.tokens[:length])
        request.kv = length
        if not request.made:
            request.cached = length
            self.counters["cached_tokens"] += length
            self.counters["prompt_tokens"] += request.prompt
        self._running.append(request)

    def _use_disk(self, prompts: PromptCache, request: Request, length: int) -> int:
        """Save a beginning that two requests share; take a longer one that an earlier process saved."""
        if length >= SHORTEST:
            prompts.save(self._context, request.sequence, request.tokens[:length])
        elif prompts.longest(request.tokens[:-1]) >= SHORTEST:
            self._context.forget(request.sequence)
            length = prompts.restore(self._context, request.sequence, request.tokens[:-1])
        return length

    def _next_group(self) -> list[Request]:
        """The running requests of one set of adapters: one decode can apply only one set."""
        kinds = list(dict.fromkeys(r.adapters for r in self._running))
        self._turn = (self._turn + 1) % len(kinds) if kinds else 0
        return [r for r in self._running if r.adapters == kinds[self._turn]] if kinds else []

    def _decode(self, group: list[Request]) -> bool:
        """Build one batch, run it, and deliver. False when the KV cache has no room for it."""
        if not group:
            return True
        decoding = [r for r in group if r.decoding]
        reading = [r for r in group if not r.decoding]
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[bool] = []
        ready: list[
            tuple[Request, int]
        ] = []  # whose next token can be chosen, and its first row in the batch

        def put(request: Request, part: list[int], outputs: bool) -> None:
            tokens.extend(part)
            positions.extend(range(request.kv, request.kv + len(part)))
            sequences.extend([request.sequence] * len(part))
            wanted.extend([outputs] * len(part))

        for request in decoding:
            ready.append((request, len(tokens)))
            put(request, [request.tokens[-1], *request.draft], outputs=True)
        room = self._context.batch - len(tokens)
        if decoding:
            room = min(room, CHUNK_AMONG_OTHERS)
        read: list[tuple[Request, int]] = []
        for request in reading:
            if room <= 0:
                break
            part = request.tokens[request.kv : request.kv + room]
            put(request, part, outputs=False)
            room -= len(part)
            read.append((request, len(part)))
            if request.kv + len(part) == len(request.tokens):
                wanted[-1] = True
                ready.append((request, len(tokens) - 1))
        self._context.use_adapters(group[0].adapters)
        started = time.perf_counter()
        done = self._context.decode(tokens, positions, sequences, wanted)
        self.counters["decode_seconds"] += time.perf_counter() - started
        if not done:
            return False
        for request, count in read:
            request.kv += count
            self._index(request.adapters).insert(request.sequence, request.tokens[: request.kv])
            request.show_life()
        for request, row in ready:
            self._choose(request, row)
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
            token = request.sampler.sample(self._context, row)
            row += 1
            request.tokens.append(token)
            request.made += 1
            self.counters["generated_tokens"] += 1
            reason = self._deliver(request, token, row - 1)
            if reason:
                request.end(reason)
                self._finish(request)
                return
            if token != guess:
                break
            request.accepted += 1
        self._count_draft(request, len(draft))

    def _count_draft(self, request: Request, drafted: int) -> None:
        """Take guesses that were wrong out of the KV cache again."""
        valid = len(request.tokens) - 1
        if drafted:
            self.counters["drafted_tokens"] += drafted
            self.counters["accepted_tokens"] += drafted - (request.kv - valid)
        if request.kv > valid:
            self._context.forget(request.sequence, valid)
            request.kv = valid

    def _deliver(self, request: Request, token: int, row: int) -> FinishReason | None:
        """Send a token's text on its way; returns why the answer ends with it, if it does."""
        if self._model.is_end(token):
            return "stop"
        wants = request.sampling.logprobs is not None
        logprob = request.sampler.logprob(self._context, row, token) if wants else None
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
        self._index(request.adapters).remove(request.sequence)
        self._context.forget(request.sequence)
        request.kv = 0

    def _finish(self, request: Request) -> None:
        """Take a request out; what it leaves in the KV cache may serve others."""
        self._running.remove(request)
        request.sampler.close()
        if self._drafter:
            self._drafter.forget(request)
        held = min(request.kv, len(request.tokens))
        if request.kv > held:
            self._context.forget(request.sequence, held)
        if held and self._shares:
            self._index(request.adapters).insert(request.sequence, request.tokens[:held])
            self._cached[request.sequence] = request.adapters
        else:
            self._release(request.sequence, request.adapters)

    # -- room in the KV cache --------------------------------------------------------------------

    def _make_room(self) -> None:
        if self._cached:
            self._evict()
        elif len(self._running) > 1:
            self._preempt(self._running[-1])
        else:
            raise EngineError(
                "the KV cache has no room for a single request", hint="Load it with a larger context."
            )

    def _evict(self, keep: int = -1) -> None:
        """Forget the finished sequence that was used longest ago."""
        oldest = next((s for s in self._cached if s != keep), keep)
        self._release(oldest, self._cached.pop(oldest))
        self.counters["evictions"] += 1

    def _preempt(self, request: Request) -> None:
        """Send a running request back to wait: it reads all its tokens again when there is room."""
        self._running.remove(request)
        self._release(request.sequence, request.adapters)
        if self._drafter:
            self._drafter.forget(request)
        request.sequence, request.kv, request.draft = -1, 0, []
        self._waiting.appendleft(request)
        self.counters["preemptions"] += 1

    def _release(self, sequence: int, adapters: Adapters) -> None:
        self._index(adapters).remove(sequence)
        self._context.forget(sequence)
        self._free.append(sequence)

    def _index(self, adapters: Adapters) -> PrefixIndex:
        return self._indexes.setdefault(adapters, PrefixIndex())

    def _give_up(self, error: Exception) -> None:
        for request in [*self._running, *self._waiting]:
            request.out.put(error)
            request.sampler.close()
            if request.sequence >= 0:
                self._release(request.sequence, request.adapters)
        self._running.clear()
        self._waiting.clear()


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning, by halving: slices are compared in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
