"""Which form to build: measure the promising few, and choose by the numbers.

Predictions order the forms; each measurement corrects them, and tells which of the others could still win. The
search ends when none could, so it chooses what measuring everything would have chosen, as long as predictions
are right within the doubts below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from alight.builder import BuildRequest, Candidate
from alight.errors import BadInput, DoesNotFit
from alight.planner import MEMORY_DOUBT, Form, Prediction

# Tried by a search, better ones first; the planner leaves out those that are no smaller than the one before.
SEARCHED = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q3_K_M", "Q2_K")

FEWEST = 3  # measured at least, so that there is something to compare
SAME_SPEED = (
    0.97  # a form this near the fastest counts as equally fast: measured speeds scatter by a few percent
)

# How far a prediction may be off, once others were measured and it is corrected by them; and before. Measured decode
# was 1.7 to 3 times the predicted, by type, on a Xeon with AVX-512 (benchmarks/compression.py --only search).
_SPEED_DOUBT, _SPEED_DOUBT_FIRST = 1.6, 2.0
_KL_DOUBT, _KL_DOUBT_FIRST = 2.5, 8.0
_TWIN_DOUBT = 1.05
_MEMORY_DOUBT, _MEMORY_DOUBT_FIRST = 0.025, MEMORY_DOUBT  # shares: the error is nearly the same for all forms


def search(
    plan: Sequence[Prediction],
    request: BuildRequest,
    measure: Callable[[Prediction], Candidate],
    known: Sequence[Candidate] = (),
) -> list[Candidate]:
    """Measure forms of a plan until no other could be chosen.

    Args:
        measure: builds and measures one form. What it costs is what the search saves.
        known: candidates that are measured already, such as the source as it is.

    Returns:
        the known ones and the measured ones, in the order of the plan.
    """
    measured: dict[str, Candidate] = {}
    while left := [p for p in plan if p.quantization not in measured]:
        have = [*known, *measured.values()]
        guesses = [_guess(p, have, request) for p in left]
        open_ = [g for g in guesses if _could_win(g, have, request)]
        if not open_ and len(measured) >= min(FEWEST, len(plan)):
            break
        likely = _best([g.likely for g in open_ or guesses], request)
        measured[likely.name] = measure(next(p for p in left if p.quantization == likely.name))
    return [*(measured[p.quantization] for p in plan if p.quantization in measured), *known]


def choose(candidates: Sequence[Candidate], request: BuildRequest) -> tuple[Candidate, str]:
    """The fastest candidate that keeps the limits on memory, speed and KL; if all lose more, the one that loses least.

    Among those that are equally fast (within 3 %) it is the one that loses least. Speed and memory are what was
    measured where the device is this machine, and what was predicted elsewhere.

    Returns:
        the candidate, and the reason in words.

    Raises:
        DoesNotFit, BadInput: none keeps the limit on memory or speed; says by how much it is missed.
    """
    limit = memory_limit(request)
    fitting = [c for c in candidates if memory_on(c, request) <= limit]
    if not fitting:
        least = min(candidates, key=lambda c: memory_on(c, request))
        name = f"{least.quantization}, the smallest that was built,"
        raise DoesNotFit(name, memory_on(least, request), limit)
    quick = [c for c in fitting if speed_on(c, request) >= request.min_speed]
    if not quick:
        best = max(fitting, key=lambda c: speed_on(c, request))
        raise BadInput(
            f"no form reaches {request.min_speed:g} tokens/s on {request.device.name}: {best.quantization} "
            f"comes nearest with {speed_on(best, request):.1f}",
            hint="Lower --min-speed, or use a smaller model.",
        )
    points = {c.quantization: c for c in quick}
    best = points[_best([_point(c, request) for c in quick], request).name]
    good = [c for c in quick if kl_of(c) <= request.max_kl]
    if good:
        return best, f"the fastest of {len(good)} whose KL to the source is at most {request.max_kl:g} nats"
    reason = f"none keeps the KL to the source under {request.max_kl:g} nats; this one loses least, {kl_of(best):.3g}"
    closer = [c for c in candidates if kl_of(c) <= request.max_kl]
    if closer:
        other = max(closer, key=lambda c: speed_on(c, request))
        binds = "memory" if other not in fitting else "speed"
        reason += f" ({other.quantization} would, at {kl_of(other):.3g}, but not within the limit on {binds})"
    return best, reason


def pareto(candidates: Iterable[Candidate], request: BuildRequest) -> tuple[Candidate, ...]:
    """The candidates that no other beats: none is as good in size, KL and speed, and better in one of them."""
    everyone = list(candidates)

    def worth(c: Candidate) -> tuple[float, float, float]:
        return (c.size, kl_of(c), -speed_on(c, request))

    def beaten(c: Candidate) -> bool:
        return any(
            all(a <= b for a, b in zip(worth(other), worth(c), strict=True)) and worth(other) != worth(c)
            for other in everyone
        )

    return tuple(c for c in everyone if not beaten(c))


def speed_on(c: Candidate, request: BuildRequest) -> float:
    """Decode speed of each stream that counts for the choice, tokens/s."""
    if request.device.id != "this":
        return c.prediction.decode
    return c.speed.decode if c.stream_speed is None else c.stream_speed


def memory_on(c: Candidate, request: BuildRequest) -> int:
    """Bytes that count for the choice."""
    measured = c.memory_bytes if request.device.id == "this" else 0
    return measured or c.prediction.memory.total


def memory_limit(request: BuildRequest) -> int:
    """Bytes that a candidate may take."""
    return min(request.device.available_bytes, request.max_memory or request.device.available_bytes)


def memory_error(candidates: Iterable[Candidate], request: BuildRequest) -> float:
    """By what predicted memory has to be multiplied, as far as the measured candidates tell."""
    return _mean_ratio((memory_on(c, request), c.prediction.memory.total) for c in candidates)


def kl_of(c: Candidate) -> float:
    return c.quality.kl_mean if c.quality.kl_mean is not None else float("inf")


# -- inside ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Point:
    name: str
    speed: float
    kl: float


@dataclass(frozen=True, slots=True)
class _Guess:
    """A form that is not measured: what it will probably be, and what it can be at best."""

    likely: _Point
    hoped: _Point
    least_memory: float


def _point(c: Candidate, request: BuildRequest) -> _Point:
    return _Point(c.quantization, speed_on(c, request), kl_of(c))


def _best(points: Sequence[_Point], request: BuildRequest) -> _Point:
    """What `choose` would choose of these, if all fit: the one order that measured and guessed ones share."""
    quick = [p for p in points if p.speed >= request.min_speed] or points
    good = [p for p in quick if p.kl <= request.max_kl]
    if not good:
        return min(quick, key=lambda p: (p.kl, -p.speed))
    fastest = max(p.speed for p in good)
    return min((p for p in good if p.speed >= SAME_SPEED * fastest), key=lambda p: (p.kl, -p.speed))


def _could_win(guess: _Guess, have: Sequence[Candidate], request: BuildRequest) -> bool:
    limit = memory_limit(request)
    if guess.hoped.speed < request.min_speed or guess.least_memory > limit:
        return False
    fitting = [c for c in have if memory_on(c, request) <= limit]
    rivals = [_point(c, request) for c in fitting if speed_on(c, request) >= request.min_speed]
    return _best([guess.hoped, *rivals], request) is guess.hoped


def _guess(p: Prediction, have: Sequence[Candidate], request: BuildRequest) -> _Guess:
    """Predictions, corrected by what was measured of others; nearly exact where that is the same type with or
    without an importance matrix, which changes the KL, and the types of very few tensors."""
    here = request.device.id == "this"
    form = Form.parse(p.quantization)
    built = [c for c in have if not c.is_source]
    twin = next((c for c in built if Form.parse(c.quantization).type == form.type), None)

    speed, speed_doubt, memory_doubt = p.decode, 1.0, 0.0
    if here and twin is not None:
        speed, speed_doubt = speed_on(twin, request), _TWIN_DOUBT
    elif here:
        speed *= _mean_ratio((speed_on(c, request), c.prediction.decode) for c in built)
        speed_doubt = _SPEED_DOUBT if built else _SPEED_DOUBT_FIRST
    if here:
        memory_doubt = _MEMORY_DOUBT if built else _MEMORY_DOUBT_FIRST
    memory = p.memory.total * memory_error(built, request) * (1 - memory_doubt)

    if twin is not None and twin.prediction.kl and math.isfinite(kl_of(twin)):
        kl = p.kl * kl_of(twin) / twin.prediction.kl
        # A matrix has never been seen to more than halve the KL, and hardly ever makes it worse.
        hoped = kl / 2 if form.imatrix else kl_of(twin)
    else:
        kl = p.kl * _mean_ratio((kl_of(c), c.prediction.kl) for c in built)
        hoped = kl / (_KL_DOUBT if built else _KL_DOUBT_FIRST)
    return _Guess(
        _Point(p.quantization, speed, kl), _Point(p.quantization, speed * speed_doubt, hoped), memory
    )


def _mean_ratio(pairs: Iterable[tuple[float, float]]) -> float:
    """The geometric mean of measured over predicted; 1 where nothing was measured."""
    logs = [math.log(a / b) for a, b in pairs if 0 < a < math.inf and 0 < b < math.inf]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0
