"""MLC's quantization modes, computed with NumPy as mlc_llm's converter computes them, bit for bit.

q0f16 and q0f32 keep weights in float. q4f16_1 and q4f32_1 hold every matrix in 4 bits: groups of 32 along a row
share a scale, max|w| / 7; an element is an integer from 0 to 14, 7 for zero. Every operation is rounded in the
mode's float type, since that is what mlc_llm's compiled quantizer does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alight.errors import BadInput

GROUP = 32
_ZERO, _LARGEST = 7, 14
_PER_WORD = 8  # elements of 4 bits in a uint32
_AT_ONCE = 1 << 20  # elements; bounds the memory of intermediate results

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Mode:
    """
    Attributes:
        name: as mlc_llm spells it.
        float_type: NumPy's name of the type of activations, norms and scales.
        quantized: whether matrices are held in 4 bits.
    """

    name: str
    float_type: str
    quantized: bool


MODES: Mapping[str, Mode] = MappingProxyType({
    "q0f16": Mode("q0f16", "float16", False),
    "q0f32": Mode("q0f32", "float32", False),
    "q4f16_1": Mode("q4f16_1", "float16", True),
    "q4f32_1": Mode("q4f32_1", "float32", True),
})  # fmt: skip


def mode(name: str) -> Mode:
    """Raises BadInput for an unknown name."""
    if name not in MODES:
        raise BadInput(f"MLC mode {name!r} is not known", hint=f"Use one of {', '.join(MODES)}.")
    return MODES[name]


def quantized_shapes(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the packed words and of the scales of a matrix."""
    groups = -(-columns // GROUP)
    return (rows, groups * GROUP // _PER_WORD), (rows, groups)


def quantize(weight: Array) -> tuple[NDArray[np.uint32], Array]:
    """A matrix (rows, columns), in the mode's float type, as words and scales.

    Returns:
        words: uint32 (rows, ceil(columns / 32) * 4); element k of a row is in word k // 8 from bit 4 * (k % 8).
        scales: (rows, ceil(columns / 32)), of the type of `weight`.
    """
    rows, columns = weight.shape
    word_shape, scale_shape = quantized_shapes(rows, columns)
    words, scales = np.empty(word_shape, np.uint32), np.empty(scale_shape, weight.dtype)
    step = max(1, _AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        words[part], scales[part] = _quantize(weight[part])
    return words, scales


def _quantize(weight: Array) -> tuple[NDArray[np.uint32], Array]:
    rows, columns = weight.shape
    padding = -columns % GROUP
    groups = np.pad(weight, ((0, 0), (0, padding))).reshape(rows, -1, GROUP)
    kind = weight.dtype.type
    scales = np.abs(groups).max(-1) / kind(_ZERO)
    flat = (scales == 0)[..., None]  # whose elements are all zero, or too small for a scale
    around = np.where(flat, kind(0), groups / np.where(flat, kind(1), scales[..., None])) + kind(_ZERO)
    integers = np.clip(np.rint(around), 0, _LARGEST).astype(np.uint32).reshape(rows, -1)
    integers[:, columns:] = 0
    shifts = 4 * np.arange(_PER_WORD, dtype=np.uint32)
    packed = np.bitwise_or.reduce(integers.reshape(rows, -1, _PER_WORD) << shifts, axis=-1)
    return packed, scales


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to bfloat16, halves to even; values must be finite."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
