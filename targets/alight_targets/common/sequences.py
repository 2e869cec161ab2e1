"""Which sequence of a backend holds which tokens, so that a prompt begins where one already ends.

A conversation's next turn goes on in the sequence of the turn before; where the backend can copy a beginning,
requests with the same system prompt share the work of reading it. Finished sequences stay until their place is
needed, the least recently used one goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from alight.errors import AlightError, EngineError
from alight_targets.common.backend import Backend
from alight_targets.common.request import Adapters, Request
from alight_targets.common.tokens import common_length

_WORTH_A_COPY = 16  # tokens; reading fewer is quicker than copying them


@dataclass(slots=True, eq=False)
class _Held:
    """A sequence and the tokens in it."""

    number: int
    adapters: Adapters
    tokens: list[int] = field(default_factory=list)
    request: Request | None = None  # that uses it now

    def common(self, tokens: Sequence[int]) -> int:
        """How many of its first tokens are those of a prompt."""
        mine = self.tokens if self.request is None else self.request.tokens[: self.request.kv]
        return common_length(mine, tokens)


class Sequences:
    """The sequences of one backend; a request takes one with `begin` and leaves it with `keep`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._held: dict[int, _Held] = {}  # the least recently used one first
        self.evictions = 0
        self.copies = type(backend).fork is not Backend.fork  # can the backend copy a beginning at all?

    @property
    def tokens(self) -> int:
        """In the KV cache."""
        return sum(h.request.kv if h.request else len(h.tokens) for h in list(self._held.values()))

    def begin(self, request: Request) -> None:
        """Give a request a sequence, with as much of its beginning as is there already (but one token)."""
        nearest, known = self._nearest(request)
        if nearest and nearest.request is None and 2 * known >= len(nearest.tokens):
            self._go_on(nearest, request, known)  # most of it is of use
            return
        number = self._room(spare=nearest)
        if number is None and nearest and nearest.request is None:  # the only one that does not run
            self._go_on(nearest, request, known)
            return
        if number is None:
            raise EngineError(f"all {self._backend.slots} sequences of the engine are in use")
        copied = bool(
            nearest and known >= _WORTH_A_COPY and self._backend.fork(nearest.number, number, known)
        )
        if not copied:
            self._backend.add(number)
        if request.sampling.adapters:
            self._adapt(number, request.sampling.adapters)
        self._held[number] = _Held(number, request.sampling.adapters, request=request)
        request.sequence, request.kv = number, known if copied else 0

    def known(self, request: Request) -> int:
        """How many tokens of a request's beginning are there already."""
        return self._nearest(request)[1]

    def keep(self, request: Request) -> None:
        """A request is done; what it leaves may serve others."""
        held = self._held.pop(request.sequence)
        self._held[held.number] = held  # the most recently used one now
        held.tokens, held.request = request.tokens[: request.kv], None

    def restart(self, request: Request, keep: int) -> None:
        """Only the first `keep` tokens of a request's sequence are still its own."""
        self._backend.rewind(request.sequence, keep)
        request.kv = keep

    def clear(self) -> None:
        """Forget all of them."""
        for number in list(self._held):
            self._forget(number)

    def _nearest(self, request: Request) -> tuple[_Held | None, int]:
        """The sequence with the longest common beginning, and its length."""
        wanted = request.tokens[:-1]  # something has to be computed to get logits
        like = [held for held in self._held.values() if held.adapters == request.sampling.adapters]
        nearest = max(like, key=lambda held: held.common(wanted), default=None)
        known = nearest.common(wanted) if nearest else 0
        return (nearest, known) if known else (None, 0)

    def _go_on(self, held: _Held, request: Request, known: int) -> None:
        """Let a request use a finished sequence, of which it has the first `known` tokens."""
        if known < len(held.tokens):
            self._backend.rewind(held.number, known)
        held.request, held.tokens = request, []
        request.sequence, request.kv = held.number, known

    def _adapt(self, number: int, adapters: Adapters) -> None:
        try:
            self._backend.adapt(number, adapters)
        except AlightError:
            self._backend.remove(number)
            raise

    def _room(self, spare: _Held | None) -> int | None:
        """A number that is free, if need be that of the least recently used sequence, but not of `spare`."""
        for number in range(self._backend.slots):
            if number not in self._held:
                return number
        for held in self._held.values():
            if not held.request and held is not spare:
                self._forget(held.number)
                self.evictions += 1
                return held.number
        return None

    def _forget(self, number: int) -> None:
        del self._held[number]
        self._backend.remove(number)
