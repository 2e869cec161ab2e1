"""Grids against the formats' own quantizers, bit for bit, and that they leave what they made as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from alight.errors import BadInput
from alight_converters.qat import grids

ALL = [grids.q4_0, grids.q8_0, grids.mlc_q4f16, grids.mlc_q4f32, grids.onnx_int4, grids.onnx_int8]
GGUF = [(grids.q4_0, GGMLQuantizationType.Q4_0), (grids.q8_0, GGMLQuantizationType.Q8_0)]

# Weights of all sizes, zeros and ties among them. Below, ggml divides by a number that has no inverse.
SMALLEST = 2.0**-100
weights = arrays.arrays(
    np.float32,
    (3, 64),
    elements=st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-7]),
        st.floats(SMALLEST, 1000, width=32),
        st.floats(-1000, -SMALLEST, width=32),
    ),
)
subnormal = torch.full((1, 32), 1e-40)


def wide_range() -> torch.Tensor:
    """Normal weights at every magnitude from where float16 scales vanish to where they end."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 64, generator=generator) * torch.logspace(-9, 4, 2000)[:, None]
    rows[0] = 0
    return rows


@pytest.mark.parametrize(("rounding", "kind"), GGUF)
def test_gguf_grids_are_what_gguf_stores(rounding: grids.Rounding, kind: GGMLQuantizationType) -> None:
    weight = wide_range()
    stored = dequantize(quantize(weight.numpy(), kind), kind)
    assert rounding(weight).numpy().tobytes() == stored.tobytes()


@pytest.mark.parametrize(("rounding", "kind"), GGUF)
@given(weight=weights)
@settings(max_examples=200, deadline=None)
def test_gguf_grids_are_what_gguf_stores_for_odd_blocks(
    rounding: grids.Rounding, kind: GGMLQuantizationType, weight: np.ndarray
) -> None:
    stored = dequantize(quantize(weight, kind), kind)
    assert rounding(torch.from_numpy(weight)).numpy().tobytes() == stored.tobytes()


@pytest.mark.parametrize("rounding", ALL)
@given(weight=weights)
@settings(max_examples=200, deadline=None)
def test_a_weight_on_the_grid_stays(rounding: grids.Rounding, weight: np.ndarray) -> None:
    once = rounding(torch.from_numpy(weight))
    assert torch.equal(rounding(once), once)


@pytest.mark.parametrize("rounding", ALL)
def test_a_weight_on_the_grid_stays_at_every_magnitude(rounding: grids.Rounding) -> None:
    once = rounding(wide_range())
    assert torch.equal(rounding(once), once)


@pytest.mark.parametrize("rounding", [grids.q4_0, grids.q8_0])
def test_a_block_too_small_for_its_scale_is_zero(rounding: grids.Rounding) -> None:
    assert torch.equal(rounding(subnormal), torch.zeros_like(subnormal))


def test_mlc_stays_for_every_float16_maximum() -> None:
    """7 * (w / 7) is not w in float16 for a few w: found by trying all of them."""
    largest = 0x7B00  # 57344; beyond, 7 * (w / 7) may exceed float16
    maxima = torch.arange(1, largest, dtype=torch.int16).view(torch.float16).float()
    blocks = maxima[:, None] * torch.linspace(-1, 1, 32)
    once = grids.mlc_q4f16(blocks)
    assert bool(torch.isfinite(once).all())
    assert torch.equal(grids.mlc_q4f16(once), once)


def mlc(weight: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    """mlc_llm's group quantization, written from its formula (docs of the format)."""
    blocks = weight.astype(dtype).reshape(-1, 32)
    scale = (np.abs(blocks).max(-1, keepdims=True) / dtype(7)).astype(dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        integers = np.where(scale == 0, 7, np.clip(np.rint(blocks / scale + dtype(7)), 0, 14)).astype(dtype)
    return ((integers - dtype(7)) * scale).astype(dtype).astype(np.float32).reshape(weight.shape)


@pytest.mark.parametrize(
    ("rounding", "dtype"), [(grids.mlc_q4f16, np.float16), (grids.mlc_q4f32, np.float32)]
)
def test_mlc_grids_are_what_mlc_stores(rounding: grids.Rounding, dtype: type[np.floating]) -> None:
    once = rounding(wide_range())
    assert np.array_equal(mlc(once.numpy(), dtype), once.numpy())
    ordinary = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * 0.05
    assert np.allclose(rounding(ordinary).numpy(), mlc(ordinary.numpy(), dtype), rtol=2e-3)


@pytest.mark.parametrize(
    ("bits", "rounding"), [(4, grids.onnx_int4), (8, grids.onnx_int8)], ids=["int4", "int8"]
)
def test_onnx_grids_are_what_onnxruntime_stores(bits: int, rounding: grids.Rounding) -> None:
    native = pytest.importorskip("onnxruntime.capi._pybind_state")
    weight = wide_range()
    rows, columns = weight.shape
    blocks = columns // 32
    packed = np.zeros((rows, blocks, 4 * bits), np.uint8)
    scales = np.zeros(rows * blocks, np.float32)
    zeros = np.zeros(rows * blocks, np.uint8)
    by_column = np.ascontiguousarray(weight.numpy().T)
    getattr(native, f"quantize_matmul_{bits}bits")(packed, by_column, scales, zeros, 32, rows, columns, True)
    integers = np.stack([packed & 15, packed >> 4], -1) if bits == 4 else packed
    signed = integers.reshape(rows, blocks, 32).astype(np.float32) - (1 << (bits - 1))
    stored = (signed * scales.reshape(rows, blocks, 1)).reshape(rows, columns)
    assert np.array_equal(rounding(weight).numpy(), stored)


def test_rows_that_do_not_divide_are_refused() -> None:
    assert not grids.fits(torch.zeros(4, 48))
    with pytest.raises(BadInput, match=r"\(4, 48\).*blocks of 32"):
        grids.q4_0(torch.zeros(4, 48))
