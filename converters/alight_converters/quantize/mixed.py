"""Mixed precision: a type for each tensor, so that a file of given size loses least.

The loss of each tensor at each type is estimated (sensitivity.py) from what llama.cpp's own rounding really
changes; which types to take is then a knapsack problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import psutil

from alight.errors import BadInput
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Progress, silent
from alight_converters.quantize import ggml, sensitivity
from alight_converters.quantize.gguf import tensor_type
from alight_converters.quantize.imatrix import Imatrix

# Those with fast kernels on every device. IQ types lose less at their size, and are slower on small CPUs.
TYPES = ("Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True, slots=True)
class Option:
    """One tensor at one type."""

    type: str
    bytes: int
    kl: float  # nats per token that it adds


def choose_types(
    checkpoint: Checkpoint,
    calibration: Calibration,
    imatrix: Imatrix,
    budget: int,
    *,
    types: Sequence[str] = TYPES,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
    measured: dict[str, Any] | None = None,
) -> dict[str, str]:
    """A ggml type for each matrix of a checkpoint, by GGUF name, for `quantize.gguf.quantize`.

    Args:
        imatrix: of this checkpoint; the quantizer has to get the same.
        budget: bytes of all tensors together, as `quantize.gguf.plan` counts them.
        types: ggml types to choose from. A tensor takes part with those that its rows can be cut into.
        measured: filled with the estimated KL of each tensor and of the whole, for the report.

    Raises:
        BadInput: an unknown type, or a budget below the smallest mix.
    """
    options = options_of(
        checkpoint, calibration, imatrix, types=types, device=device, seed=seed, progress=progress
    )
    fixed = fixed_bytes(checkpoint)
    chosen = solve(options, budget - fixed)
    if measured is not None:
        measured |= told(options, chosen, fixed)
    return {name: option.type for name, option in chosen.items()}


def options_of(
    checkpoint: Checkpoint,
    calibration: Calibration,
    imatrix: Imatrix,
    *,
    types: Sequence[str] = TYPES,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, list[Option]]:
    """What each matrix would take and lose at each type: the part that takes long, and is the same for all budgets.

    Raises:
        BadInput: an unknown type, or a matrix that none of them can divide.
    """
    types = [tensor_type(name) for name in types]
    fishers = sensitivity.measure(
        checkpoint, calibration, imatrix, device=device, seed=seed, progress=progress
    )
    return _options(checkpoint, imatrix, fishers, types, progress)


def fixed_bytes(checkpoint: Checkpoint) -> int:
    """What is not chosen: vectors stay float32."""
    return sum(4 * shape[0] for shape in checkpoint.shapes.values() if len(shape) == 1)


def told(options: Mapping[str, Sequence[Option]], chosen: Mapping[str, Option], fixed: int) -> dict[str, Any]:
    """What the report says of a mix: its size and estimated KL, and the estimated KL of each tensor at each type."""
    return {
        "bytes": fixed + sum(option.bytes for option in chosen.values()),
        "estimated_kl": sum(option.kl for option in chosen.values()),
        "tensors": {name: {o.type: o.kl for o in options[name]} for name in sorted(options)},
    }


def solve(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option for each tensor, the sum of their KL as small as it gets within `budget` bytes.

    Steps with the best ratio of KL to bytes are taken first; that is optimal but for the last step, which may
    not fit. No type that is the same for all tensors is better.

    Raises:
        BadInput: even the smallest options do not fit.
    """
    frontiers = {name: _frontier(list(choices)) for name, choices in options.items()}
    level = dict.fromkeys(frontiers, 0)
    free = budget - sum(frontier[0].bytes for frontier in frontiers.values())
    if free < 0:
        raise BadInput(
            f"the smallest mix of types has {(budget - free) / 1e6:.1f} MB, the budget is {budget / 1e6:.1f} MB",
            hint="Give a larger budget, or smaller types.",
        )
    steps = [
        ((low.kl - high.kl) / (high.bytes - low.bytes), name, number)
        for name, frontier in frontiers.items()
        for number, (low, high) in enumerate(pairwise(frontier))
    ]
    for _, name, number in sorted(steps, reverse=True):
        low, high = frontiers[name][number : number + 2]
        if level[name] == number and high.bytes - low.bytes <= free:
            level[name] = number + 1
            free -= high.bytes - low.bytes
    mixes = [{name: frontier[level[name]] for name, frontier in frontiers.items()}]
    mixes += [mix for mix in _uniform(options) if sum(o.bytes for o in mix.values()) <= budget]
    return min(mixes, key=lambda mix: sum(option.kl for option in mix.values()))


def _frontier(choices: list[Option]) -> list[Option]:
    """From the smallest option up, those that no mix of two others beats: the lower convex hull."""
    hull: list[Option] = []
    for option in sorted(choices, key=lambda o: (o.bytes, o.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(low: Option, high: Option) -> float:
    return (low.kl - high.kl) / (high.bytes - low.bytes)


def _uniform(options: Mapping[str, Sequence[Option]]) -> list[dict[str, Option]]:
    """The mixes that take one type for all tensors."""
    by_type = {name: {option.type: option for option in choices} for name, choices in options.items()}
    common = set.intersection(*(set(choices) for choices in by_type.values()))
    return [{name: by_type[name][kind] for name in by_type} for kind in sorted(common)]


def _options(
    checkpoint: Checkpoint,
    imatrix: Imatrix,
    fishers: Mapping[str, sensitivity.Fisher],
    types: Sequence[str],
    progress: Progress,
) -> dict[str, list[Option]]:
    """Round every matrix to every type. llama.cpp's rounding runs outside of Python's lock, so in threads."""
    tensors = sensitivity.matrices(checkpoint)

    def of(name: str) -> list[Option]:
        weights = checkpoint.tensor(tensors[name]).float().numpy()
        columns = weights.shape[1]
        importance = imatrix.mean(name) if name in imatrix.sums else np.ones(columns, np.float32)
        usable = [kind for kind in types if ggml.fits(kind, columns)]
        if not usable:
            raise BadInput(
                f"{name} has {columns} columns, which none of {', '.join(types)} can divide",
                hint="Give a type with smaller blocks: Q8_0, Q5_0, Q4_0.",
            )
        return [
            Option(
                kind,
                ggml.size(kind, weights.size),
                fishers[name].kl(ggml.rounded(weights, kind, importance) - weights),
            )
            for kind in usable
        ]

    found = {}
    with ThreadPoolExecutor(psutil.cpu_count(logical=False) or 1) as pool:
        for name, options in zip(tensors, pool.map(of, tensors), strict=True):
            found[name] = options
            progress("rounding", len(found), len(tensors))
    return found
