"""Round matrices to the integers of ONNX Runtime's MatMulNBits: blocks of a row that share a scale.

Matrices are (rows, columns) in float32, blocks lie along the columns. Integers are unsigned; a weight is
(integer - zero point) * scale, where the zero point is half of the range unless a block has one of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_AT_ONCE = 1 << 16  # weights: few enough that what is computed of them stays in a processor's cache
_SHRUNK = np.linspace(0.72, 1.08, 13, dtype=np.float32)  # of a block's range: what the search tries
_SHIFTS = (-1, 0, 1)  # of its zero point
_UNSEEN = np.float32(
    1e-4
)  # least importance, of the mean: what calibration never used is still part of the model
_TINY = 1e-30


@dataclass(frozen=True)
class Grid:
    """The integers that a matrix is rounded to.

    Attributes:
        bits: 4 or 8. block: columns that share a scale.
        symmetric: zero points are half of the range; else each block has its own, and another byte per block.
    """

    bits: int
    block: int
    symmetric: bool

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid.

    Attributes:
        integers: shape (rows, blocks, block).
        scales: shape (rows, blocks), float32, or float16 where that is exact.
        zero_points: shape (rows, blocks); None where all are the middle of the range.
    """

    grid: Grid
    integers: Bytes
    scales: NDArray[Any]
    zero_points: Bytes | None

    def weights(self) -> Floats:
        """The matrix that these integers stand for, as the runtime computes it."""
        zero = self.grid.middle if self.zero_points is None else self.zero_points[..., None]
        found = (self.integers.astype(np.float32) - np.float32(zero)) * self.scales[..., None].astype(
            np.float32
        )
        return found.reshape(len(found), -1)


def to_nearest(matrix: Floats, grid: Grid, *, half_scales: bool = False) -> Rounded:
    """As ONNX Runtime's own quantizer does it (`MlasQuantizeBlockwise`), bit for bit.

    A symmetric block is scaled so that its largest weight lies on the end of the range: the grids
    `onnx_int4` and `onnx_int8`, on which quantization-aware training leaves weights.

    Args:
        half_scales: scales are float16: no longer bit for bit, but half as large.
    """
    blocks = matrix.reshape(len(matrix), -1, grid.block)
    low, high = blocks.min(-1), blocks.max(-1)
    if grid.symmetric:
        scales = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-grid.middle)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scales = (high - low) / np.float32(grid.largest)
    kept = _to_float16(scales) if half_scales else scales
    scales = kept.astype(np.float32)
    zero = np.full_like(scales, grid.middle if grid.symmetric else 0)
    if not grid.symmetric:
        np.divide(-low, scales, out=zero, where=scales != 0)
        zero = np.clip(_half_away(zero), 0, grid.largest)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    inverse[~np.isfinite(inverse)] = 0
    integers = np.clip(_half_away(blocks * inverse[..., None] + zero[..., None]), 0, grid.largest)
    zero_points = None if grid.symmetric else zero.astype(np.uint8)
    return Rounded(grid, integers.astype(np.uint8), kept, zero_points)


def by_importance(matrix: Floats, grid: Grid, importance: Floats) -> Rounded:
    """With the scales, and zero points, that lose least where it matters: a search over both.

    The error of a weight counts as llama.cpp counts it for Q4_0: by the mean square of what it is multiplied
    with, `importance`, shape (columns,), and somewhat more where the weight is large. For each shrunken range
    the scale is the least squares one for the integers that the range gives. Scales are float16, since
    they are free to be.
    """
    rows, columns = matrix.shape
    importance = importance + _UNSEEN * max(float(importance.mean()), _TINY)
    found = Rounded(
        grid,
        np.empty((rows, columns // grid.block, grid.block), np.uint8),
        np.empty((rows, columns // grid.block), np.float16),
        None if grid.symmetric else np.empty((rows, columns // grid.block), np.uint8),
    )
    step = max(1, _AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        counted = matrix[part]
        weight = importance * np.sqrt(np.square(counted).mean(-1, keepdims=True) + np.square(counted))
        integers, scales, zero = _search(_columns(counted, grid), _columns(weight, grid), grid)
        found.integers[part] = integers.T.reshape(found.integers[part].shape)
        found.scales[part] = scales.reshape(found.scales[part].shape)
        if found.zero_points is not None:
            found.zero_points[part] = zero.reshape(found.scales[part].shape)
    return found


def _columns(matrix: Floats, grid: Grid) -> Floats:
    """Blocks as columns: sums over a block then run along contiguous memory."""
    return np.ascontiguousarray(matrix.reshape(-1, grid.block).T)


def _search(x: Floats, weight: Floats, grid: Grid) -> tuple[Bytes, NDArray[np.float16], Bytes]:
    """Integers, shape (block, blocks), scales and zero points, shape (blocks,), of the least weighted error."""
    weighted = weight * x
    best, scales, zero = (np.zeros(x.shape[1], np.float32) for _ in range(3))
    for scale, middle in _candidates(x, grid):
        with np.errstate(divide="ignore"):
            levels = np.rint(x / scale)
        np.clip(levels, -middle, grid.largest - middle, out=levels)
        product = np.einsum("ij,ij->j", weighted, levels)
        levels *= levels
        power = np.maximum(np.einsum("ij,ij->j", weight, levels), _TINY)
        gain = product * product / power  # what is explained of the block's weighted square
        better = gain > best
        best[better], scales[better], zero[better] = gain[better], (product / power)[better], middle[better]
    rounded = _to_float16(scales)
    used = np.where(rounded == 0, 1, rounded).astype(np.float32)
    integers = np.clip(np.rint(x / used) + zero, 0, grid.largest)
    return integers.astype(np.uint8), rounded, zero.astype(np.uint8)


def _candidates(x: Floats, grid: Grid) -> Any:
    """Scales and zero points to try, shape (blocks,) each. No scale is 0."""
    low, high = np.minimum(x.min(0), 0), np.maximum(x.max(0), 0)
    if grid.symmetric:
        largest = np.where(high > -low, high, low) / np.float32(-grid.middle)
        middle = np.full_like(largest, grid.middle)
        for shrunk in _SHRUNK:
            yield _not_zero(largest * shrunk), middle
        return
    whole = _not_zero((high - low) / np.float32(grid.largest))
    for shift in _SHIFTS:
        middle = np.clip(np.rint(-low / whole) + shift, 0, grid.largest).astype(np.float32)
        for shrunk in _SHRUNK:
            yield whole * shrunk, middle


def _not_zero(scale: Floats) -> Floats:
    return np.where(np.abs(scale) < _TINY, np.float32(1), scale)


def _to_float16(scales: Floats) -> NDArray[np.float16]:
    return np.clip(scales, -65504, 65504).astype(np.float16)


def _half_away(x: Floats) -> Floats:
    """C's `roundf`; NumPy takes halves to the even neighbour."""
    size = np.abs(x)
    whole = np.floor(size)
    found: Floats = np.copysign(whole + np.floor(2 * (size - whole)), x)
    return found
