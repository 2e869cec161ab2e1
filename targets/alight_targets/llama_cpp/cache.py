"""The KV cache: which sequence holds which tokens, what is kept, and how the cells are laid out.

A finished sequence stays for whoever begins with the same tokens. When its cells are needed, its state is
parked in memory outside of the cache while there is room, and comes back from there. When what runs does not
fit the layout, everything moves to a context of another one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alight import devices
from alight.errors import EngineError
from alight_targets.llama_cpp.layout import UNIFIED, Layouts
from alight_targets.llama_cpp.native import NativeContext
from alight_targets.llama_cpp.prefix import PrefixIndex
from alight_targets.llama_cpp.prompt_cache import SHORTEST, PromptCache
from alight_targets.llama_cpp.request import Adapters, Request
from alight_targets.llama_cpp.state import NotConvertible, with_streams

log = logging.getLogger("alight.llama_cpp")

WORTH_MOVING = 32  # tokens; fewer are read again as quickly as their state is copied
AHEAD = 256  # tokens that a request is expected to make, where it may make more
_FIRST = 512  # tokens that the first request is expected to need
_MARGIN = 4  # parked states take no more than this part of the memory that is free


@dataclass(slots=True)
class _Parked:
    """A finished sequence outside of the cache."""

    state: bytes
    streams: int  # of the context that it comes from
    adapters: Adapters


class Cache:
    """The cells of one model, and everything that is in them.

    Args:
        open_context: makes a context for so many sequences, unified or not.
        shares: whether sequences can be cut and copied (recurrent ones cannot).
        limit: tokens of one request at most.
        prompts: keeps shared prompts on disk.
    """

    def __init__(
        self,
        open_context: Callable[[int, bool], NativeContext],
        layouts: Layouts,
        *,
        shares: bool,
        limit: int,
        prompts: PromptCache | None = None,
    ) -> None:
        self._open_context = open_context
        self._layouts = layouts
        self._shares = shares
        self._limit = limit
        self._prompts = prompts
        self._kept: dict[int, Adapters] = {}  # finished sequences, least recently used first
        self._parked: dict[int, _Parked] = {}  # the same, outside of the cache; their numbers never recur
        self._indexes: dict[Adapters, PrefixIndex] = {}  # keys and values depend on the adapters, too
        self._next_parked = 1 << 20
        self._too_large: set[int] = set()  # layouts that there was no memory for
        self.evictions = self.moves = 0
        self._open(layouts.best([_FIRST]))

    # -- layout ----------------------------------------------------------------------------------

    def make_way(self, running: Sequence[Request], arriving: Sequence[Request]) -> bool:
        """Take the layout that suits them all. Sequences may get other numbers. False where its compute buffers do
        not fit: who arrives has to wait."""
        wants = [self._want(r) for r in (*running, *arriving)]
        best = self._layouts.best(wants)
        # Leaving the unified cache moves everything, so there should be room for a newcomer afterwards.
        roomier = self.streams == UNIFIED and (not running or best > len(wants))
        suits = self._layouts.suits(self.streams, wants)
        if (roomier or not suits) and not (running and best in self._too_large):
            return self._change(best, running) or suits
        return suits

    def let_grow(self, running: Sequence[Request]) -> None:
        """Give a request that fills its part of the cells a larger one. Sequences may get other numbers."""
        if self.streams > UNIFIED:
            needs = [len(r.tokens) + len(r.draft) for r in running]
            best = self._layouts.best([self._want(r) for r in running])
            if not self._layouts.suits(self.streams, needs) and best not in self._too_large:
                self._change(best, running)

    def close_ranks(self, running: Sequence[Request]) -> None:
        """Number the running sequences without gaps: llama.cpp runs only neighbours together."""
        if self.streams == UNIFIED:
            return
        taken = {r.sequence for r in running}
        for request in sorted(running, key=lambda r: -r.sequence):
            gap = next((s for s in range(min(taken), request.sequence) if s not in taken), None)
            if gap is None:
                return
            taken.remove(request.sequence)
            self._exchange(request, gap)
            taken.add(gap)

    def _want(self, request: Request) -> int:
        ahead = min(request.limit - request.made, AHEAD)
        return min(len(request.tokens) + ahead, self._limit)

    def _open(self, streams: int) -> None:
        sequences = self._layouts.sequences if streams == UNIFIED else streams
        self.context = self._open_context(sequences, streams == UNIFIED)
        self.streams = streams
        self._free = list(range(sequences))

    def _change(self, streams: int, running: Sequence[Request]) -> bool:
        """False: there is no memory for it, and the layout is what it was."""
        if streams == self.streams:
            return True
        log.debug("KV cache: from %d streams to %d for %d requests", self.streams, streams, len(running))
        old = self.streams
        states = self._states(running)
        for sequence in list(self._kept):
            self._park(sequence)
        for adapters, index in self._indexes.items():
            for sequence in [r.sequence for r in running if r.adapters == adapters]:
                index.remove(sequence)
        self.context.close()
        fits = self._try_open(streams)
        if not fits:
            self._open(old)
        self.moves += 1
        for request in running:
            request.sequence = self._free.pop(0)
            if request in states and self._restore(request.sequence, states.pop(request), old):
                self.note(request)
            else:  # reads its tokens again
                self.context.forget(request.sequence)
                request.kv, request.draft = 0, []
        return fits

    def _try_open(self, streams: int) -> bool:
        try:
            self._open(streams)
        except EngineError as error:
            log.warning("no room for a KV cache of %d streams: %s", streams, error)
            self._too_large.add(streams)
            return False
        self._too_large.clear()
        return True

    def _states(self, running: Sequence[Request]) -> dict[Request, bytes]:
        """Copies of the running sequences, as many as there is memory for; the others are read again."""
        room = devices.available_memory() // 2
        states = {}
        for request in running:
            room -= self.context.state_size(request.sequence)
            if request.kv and room > 0:
                states[request] = self.context.state(request.sequence)
        return states

    def _exchange(self, request: Request, target: int) -> None:
        """Move a running sequence to another number; what is kept there comes to its old one."""
        source, request.sequence = request.sequence, target
        index = self._index(request.adapters)
        index.remove(source)
        state = self.context.state(source) if request.kv else b""
        self.context.forget(source)
        if target in self._kept:
            adapters = self._kept[target]
            tokens = self._index(adapters).tokens(target)
            self._index(adapters).remove(target)
            if self.context.set_state(source, self.context.state(target)):
                self._index(adapters).insert(source, tokens)
                order = {source if s == target else s: a for s, a in self._kept.items()}
                self._kept = order
            else:
                del self._kept[target]
                self._free.append(source)
            self.context.forget(target)
        else:
            self._free.remove(target)
            self._free.append(source)
        if request.kv and self.context.set_state(target, state):
            self.note(request)
        else:
            request.kv, request.draft = 0, []

    # -- sequences -------------------------------------------------------------------------------

    def known(self, tokens: list[int], adapters: Adapters) -> int:
        """How many of these tokens some sequence begins with."""
        index = self._indexes.get(adapters)
        return index.longest(tokens)[1] if index and self._shares else 0

    def begin(self, request: Request, *, alone: bool) -> int:
        """Give a request a sequence; returns how many of its tokens are in it already.

        Args:
            alone: nothing else runs.
        """
        index = self._index(request.adapters)
        owner, length = index.longest(request.tokens[:-1]) if self._shares else (-1, 0)
        length = request.without_half_image(length)
        if owner in self._kept:
            self._kept[owner] = self._kept.pop(owner)  # now the most recently used
        only = not self._free and list(self._kept) == [owner]
        if length and (only or self._is_continued(owner, length)):
            del self._kept[owner]
            request.sequence = owner
            self.context.forget(owner, request.position(length))
        else:
            parked = self._parked.pop(owner, None)  # so that none that is parked now takes its place
            request.sequence = self._vacant(keep=owner)
            if parked:
                length = self._unpark(owner, parked, request, length)
            elif length:
                length = self._copy(owner, request, length)
        if self._prompts and not request.adapters and not request.images:
            length = self._use_disk(self._prompts, request, length)
        index.remove(request.sequence)
        if length:
            index.insert(request.sequence, request.tokens[:length])
        if self.streams == UNIFIED and not self._layouts.fixed and alone:
            while self.make_room():  # attention would walk over the others' cells for every token
                pass
        return length

    def note(self, request: Request) -> None:
        """Its tokens that are in the cache now can be shared."""
        self._index(request.adapters).insert(request.sequence, request.tokens[: request.kv])

    def keep(self, request: Request) -> None:
        """The request is finished; what it leaves may serve others."""
        held = min(request.kv, len(request.tokens))
        if request.kv > held:
            self.context.forget(request.sequence, request.position(held))
        if held and self._shares:
            self._index(request.adapters).insert(request.sequence, request.tokens[:held])
            self._kept[request.sequence] = request.adapters
        else:
            self.release(request)

    def release(self, request: Request) -> None:
        """The request leaves nothing."""
        index = self._index(request.adapters)
        index.remove(request.sequence)
        if not index:
            del self._indexes[request.adapters]  # clients choose adapters and scales as they like
        self.context.forget(request.sequence)
        self._free.append(request.sequence)

    def restart(self, request: Request) -> None:
        """The request reads its tokens from the first one again."""
        self._index(request.adapters).remove(request.sequence)
        self.context.forget(request.sequence)
        request.kv = 0

    def make_room(self) -> bool:
        """Free the cells of the finished sequence that was used longest ago. False where there is none."""
        if not self._kept:
            return False
        self._evict()
        return True

    def used(self, running: Sequence[Request]) -> int:
        """Cells in use; where sequences share some, these count once for each."""
        kept = sum(len(self._index(a).tokens(s)) for s, a in self._kept.items())
        return min(kept + sum(r.kv for r in running), self._layouts.cells)

    def reset(self) -> None:
        """Begin anew with nothing in the cache. Raises EngineError where there is no context, and none can be made."""
        self._kept.clear()
        self._parked.clear()
        self._indexes.clear()
        self.context.close()
        self._open(self.streams)

    def close(self) -> None:
        self.context.close()

    def _is_continued(self, owner: int, length: int) -> bool:
        """Does the request go on where a finished one ended, so that nobody else will?"""
        if owner not in self._kept or self.streams == UNIFIED:
            return False
        return 4 * length >= 3 * len(self._tokens(owner))

    def _copy(self, owner: int, request: Request, length: int) -> int:
        """Begin a request's sequence with the first tokens of another; returns how many."""
        if self.streams == UNIFIED:
            self.context.share(owner, request.sequence, request.position(length))
            return length
        if length < WORTH_MOVING:
            return 0
        done = self.context.set_state(request.sequence, self.context.state(owner))
        self.context.forget(request.sequence, length if done else 0)
        return length if done else 0

    def _unpark(self, owner: int, parked: _Parked, request: Request, length: int) -> int:
        """Begin a request's sequence with the first tokens of a parked one; returns how many."""
        index = self._index(parked.adapters)
        if 4 * length >= 3 * len(index.tokens(owner)):  # it goes on
            index.remove(owner)
        else:
            self._parked[owner] = parked  # now the most recently used
        done = length >= WORTH_MOVING and self._restore(request.sequence, parked.state, parked.streams)
        self.context.forget(request.sequence, length if done else 0)
        return length if done else 0

    def _use_disk(self, prompts: PromptCache, request: Request, length: int) -> int:
        """Save a beginning that two requests share; take a longer one that an earlier process saved."""
        if length >= SHORTEST:
            if not prompts.has(request.tokens[:length]):
                prompts.save(self._portable(request.sequence), request.tokens[:length])
            return length
        saved, state = prompts.restore(request.tokens[:-1])
        if saved < SHORTEST:
            return length
        done = self._restore(request.sequence, state, UNIFIED)
        self.context.forget(request.sequence, saved if done else 0)
        return saved if done else 0

    def _portable(self, sequence: int) -> bytes:
        """A sequence's state as a unified context writes it; none where it cannot be."""
        try:
            return with_streams(self.context.state(sequence), UNIFIED)
        except NotConvertible:
            return b""

    def _restore(self, sequence: int, state: bytes, streams: int) -> bool:
        """Put a state of a context with so many streams into a sequence."""
        if streams != self.streams:
            try:
                state = with_streams(state, self.streams)
            except NotConvertible as error:
                log.debug("a state is given up: %s", error)
                return False
        return self.context.set_state(sequence, state)

    def _vacant(self, keep: int) -> int:
        """A sequence that nobody needs; not `keep`, if there is another."""
        if not self._free:
            self._evict(keep)
        sequence = min(self._free)
        self._free.remove(sequence)
        return sequence

    def _evict(self, keep: int = -1) -> None:
        oldest = next((s for s in self._kept if s != keep), keep)
        self._park(oldest)
        self.context.forget(oldest)
        self._free.append(oldest)
        self.evictions += 1

    def _park(self, sequence: int) -> None:
        """Copy a finished sequence to memory outside of the cache, as far as there is some."""
        adapters = self._kept[sequence]
        tokens = self._tokens(sequence)
        room = self._layouts.cells - sum(len(self._tokens(p)) for p in self._parked)
        size = self.context.state_size(sequence)
        if (
            len(tokens) >= WORTH_MOVING
            and not self._layouts.fixed
            and _MARGIN * size < devices.available_memory()
        ):
            while self._parked and room < len(tokens):
                oldest = next(iter(self._parked))
                room += len(self._tokens(oldest))
                self._index(self._parked.pop(oldest).adapters).remove(oldest)
            self._parked[self._next_parked] = _Parked(self.context.state(sequence), self.streams, adapters)
            self._index(adapters).insert(self._next_parked, tokens)
            self._next_parked += 1
        self._index(adapters).remove(sequence)
        del self._kept[sequence]

    def _tokens(self, owner: int) -> list[int]:
        adapters = self._parked[owner].adapters if owner in self._parked else self._kept[owner]
        return self._index(adapters).tokens(owner)

    def _index(self, adapters: Adapters) -> PrefixIndex:
        return self._indexes.setdefault(adapters, PrefixIndex())
