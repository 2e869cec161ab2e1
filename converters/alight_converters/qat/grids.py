"""The grids on which artifacts can hold weights, as functions that round weights to them.

Each function gives what the format's own quantizer and dequantizer would make of a weight, bit for bit. All
of them are idempotent: a weight on the grid stays as it is, so a checkpoint of such weights is quantized
without any loss. (The element of largest magnitude decides a block's scale and lands on the end of the grid,
where it decides on the same scale again.)

Weights are (rows, columns) in float32; blocks of 32 lie along the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alight.errors import BadInput

BLOCK = 32

Rounding = Callable[[Tensor], Tensor]


def q8_0(weight: Tensor) -> Tensor:
    """GGUF Q8_0: 8-bit integers times a float16 scale, max|w| / 127 (ggml's `quantize_row_q8_0_ref`)."""
    blocks = _blocks(weight)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (_round_half_away(blocks * _inverse(scale)) * _to_float16(scale)).reshape(weight.shape)


def q4_0(weight: Tensor) -> Tensor:
    """GGUF Q4_0: integers from -8 to 7 times a float16 scale, the largest weight / -8 (ggml's
    `quantize_row_q4_0_ref`). The scale has a sign, so that the largest weight is exactly on -8."""
    blocks = _blocks(weight)
    scale = _largest(blocks) / -8
    integers = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15) - 8
    return (integers * _to_float16(scale)).reshape(weight.shape)


def onnx_int4(weight: Tensor) -> Tensor:
    """ONNX Runtime's MatMulNBits, 4 bits, symmetric: integers from -8 to 7 times a float32 scale."""
    return _onnx(weight, 8)


def onnx_int8(weight: Tensor) -> Tensor:
    """ONNX Runtime's MatMulNBits, 8 bits, symmetric: integers from -128 to 127 times a float32 scale."""
    return _onnx(weight, 128)


def _onnx(weight: Tensor, half_range: int) -> Tensor:
    """`MlasQuantizeBlockwise` of ONNX Runtime. Its integers are unsigned when they are rounded."""
    blocks = _blocks(weight)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    scale = torch.where(high.abs() > low.abs(), high, low) / -half_range
    unsigned = _round_half_away(blocks * _inverse(scale) + half_range).clamp(0, 2 * half_range - 1)
    return ((unsigned - half_range) * scale).reshape(weight.shape)


def mlc_q4f16(weight: Tensor) -> Tensor:
    """MLC q4f16_1: integers from -7 to 7 times a float16 scale, max|w| / 7, every operation in float16."""
    return _mlc(_mlc(weight, torch.float16), torch.float16)


def mlc_q4f32(weight: Tensor) -> Tensor:
    """MLC q4f32_1: as q4f16_1, every operation in float32."""
    return _mlc(_mlc(weight, torch.float32), torch.float32)


def _mlc(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Applied twice by its callers: 7 * (w / 7) rounds to a neighbour of w for some w, but never twice."""
    blocks = _blocks(weight.to(dtype))
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    integers = torch.where(scale == 0, 7, blocks / scale + 7).round().clamp(0, 14) - 7
    return (integers * scale).reshape(weight.shape).float()


@dataclass(frozen=True)
class Grid:
    """The grids of one artifact format.

    Attributes:
        linear: for the linear layers of the decoder, and for an embedding with a head of its own.
        head: for the head, and for the embedding where it is the head as well.
    """

    linear: Rounding
    head: Rounding


# llama.cpp's Q4_0 keeps the head at Q8_0 where rows are no multiple of 256 long, and at Q6_K elsewhere. Q6_K
# searches for its scales, so nothing is certain to stay as it is: a trained model wants Q8_0 there too.
GRIDS = {
    "q4_0": Grid(q4_0, q8_0),
    "q8_0": Grid(q8_0, q8_0),
    "q4f16_1": Grid(mlc_q4f16, mlc_q4f16),
    "q4f32_1": Grid(mlc_q4f32, mlc_q4f32),
    "onnx_int4": Grid(onnx_int4, onnx_int8),
}


def fits(weight: Tensor) -> bool:
    """Whether rows divide into blocks. Those that do not stay in float, here as in the artifact."""
    return weight.shape[-1] % BLOCK == 0


def _blocks(weight: Tensor) -> Tensor:
    if not fits(weight):
        raise BadInput(f"a weight of shape {tuple(weight.shape)} does not divide into blocks of {BLOCK}")
    return weight.reshape(-1, BLOCK)


def _largest(blocks: Tensor) -> Tensor:
    """The element of largest magnitude in each block, with its sign; the first one of equals."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def _inverse(scale: Tensor) -> Tensor:
    """0 for scales so small that float32 has no inverse, as for 0: such a block is rounded to zeros."""
    return (1 / scale).nan_to_num(nan=0, posinf=0, neginf=0)


def _to_float16(scale: Tensor) -> Tensor:
    return scale.half().float()


def _round_half_away(x: Tensor) -> Tensor:
    """C's `roundf`; `Tensor.round` takes halves to the even neighbour. Zero has no sign afterwards."""
    size = x.abs()
    whole = size.floor()
    return torch.copysign(whole + (2 * (size - whole)).floor(), x) + 0.0
