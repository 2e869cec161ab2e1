"""Which widths a pruned model should have: rounded to what kernels want, even, and close to the target."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from alight_converters.prune.structure import Dimension, Sizes, Structure

K_QUANT = 256  # weights in a block of llama.cpp's k-quants
BLOCK = 32  # weights in a block of its other types


def steps(structure: Structure, dimension: Dimension, multiple: int | None) -> list[int]:
    """The sizes that a dimension may get, up to what it has.

    Rows of quantized matrices are cut into blocks, so a width is a multiple of 256 if it was one, and of 32
    if not, or of `multiple`. What counts for attention is heads x head size, of whole groups.
    """
    width = structure.heads_per_group * structure.head_dim if dimension == "groups" else 1
    full = structure.sizes[dimension]
    block = multiple or (K_QUANT if full * width % K_QUANT == 0 else BLOCK)
    return [size for size in range(1, full) if size * width % block == 0] + [full]


def choose(
    structure: Structure, limit: int, axes: Sequence[Dimension], candidates: Iterable[Sizes]
) -> Sizes | None:
    """The candidate of at most `limit` parameters that is nearest to it and shrinks all axes alike; None if
    all have more.

    What is minimized is a sum of two shares: of the limit that is not used, and by how much the axis that
    keeps most of its units exceeds the one that keeps least.
    """

    def cost(sizes: Sizes) -> float:
        shares = [sizes[axis] / structure.sizes[axis] for axis in axes]
        return 1 - structure.parameters(sizes) / limit + max(shares) - min(shares)

    return min((s for s in candidates if structure.parameters(s) <= limit), key=cost, default=None)


def combinations(structure: Structure, options: dict[Dimension, list[int]]) -> Iterable[Sizes]:
    """Every combination of these sizes; dimensions without options stay as they are."""
    for sizes in itertools.product(*options.values()):
        yield structure.sizes | dict(zip(options, sizes, strict=True))
