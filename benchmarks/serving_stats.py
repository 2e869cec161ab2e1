"""The arithmetic of a comparison: medians, percentiles, and ratios of what was measured side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Figures: TypeAlias = dict[str, float]


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: a value that occurred."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def medians(repeats: Sequence[Mapping[str, float]]) -> Figures:
    """The median of each figure over the repeats of one measurement."""
    return {name: median([r[name] for r in repeats]) for name in repeats[0]}


def ratios(rounds: Sequence[tuple[float, float]]) -> list[float]:
    """Ours over theirs, in each round. Both were measured within a minute, so a machine that is slower for
    a while changes both."""
    return [ours / theirs for ours, theirs in rounds]
