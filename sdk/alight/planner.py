"""Predict memory and speed of a model on a device, and pick the form of it that fits.

Everything here comes from a GGUF header or a config.json; no weights are loaded. Memory is what
llama.cpp allocates: weights, KV cache, compute buffers. Speed is a roofline: a decode step reads every
weight once (memory bandwidth) and multiplies with it (arithmetic); prefill is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from alight.devices import Device
from alight.errors import BadInput, DoesNotFit
from alight.quantization import QUANT_TYPES, Form, quant_type, quantized, role_of
from alight.shape import Matrix, Shape, shape_of_checkpoint, shape_of_gguf

__all__ = [
    "QUANT_TYPES",
    "Form",
    "Memory",
    "Prediction",
    "Shape",
    "fit_context",
    "memory",
    "plan",
    "predict",
    "quant_type",
    "quantized",
    "shape_of_checkpoint",
    "shape_of_gguf",
]

BATCH = 512  # tokens per prefill step of the llama.cpp target: sets the compute buffers
OUTPUTS = 32  # rows of logits: one per sequence that the engine keeps
DEFAULT_CONTEXT = 4096
SMALLEST_CONTEXT = 512
RESERVE = 0.08  # share of the free memory that is left to the system

# What the process itself takes: Python, NumPy and llama.cpp, and the vocabulary's tables per token.
# Measured with benchmarks/planner.py.
RUNTIME_BYTES = 61_000_000
VOCABULARY_BYTES = 330

KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a loaded model."""

    weights: int
    kv: int
    compute: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute + self.runtime


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model in one form would be on a device. Speeds are tokens per second of one stream among `streams`."""

    quantization: str
    memory: Memory
    context: int
    prefill: float
    decode: float
    limit: str  # what bounds decode: "memory bandwidth" or "arithmetic"
    streams: int = 1
    kl: float = 0.0  # mean KL to the float model, nats: a rough prior, good for an order


# Predicted memory may be off by this share of it: 1.5 to 4 % too high on the machines that were measured
# (docs/benchmarks.md), with benchmarks/planner.py. What lies within it is decided by measuring.
MEMORY_DOUBT = 0.05

# Tried for a build unless the user names types: the ones that are best at their size or speed.
WORTH_TRYING = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")

# -- memory ------------------------------------------------------------------------------------------


def memory(shape: Shape, *, context: int, kv_type: str = "f16", outputs: int = OUTPUTS) -> Memory:
    """Bytes that a model takes once loaded with a KV cache of `context` tokens and rows for `outputs` logits."""
    kv = 2 * shape.layers * shape.kv_width * context * KV_BYTES[kv_type]
    per_token = 4 * (2 * shape.ffn + 6 * shape.hidden + 2 * shape.kv_width) + 2 * context
    compute = min(BATCH, context) * per_token + 2 * 4 * outputs * shape.vocabulary
    runtime = RUNTIME_BYTES + VOCABULARY_BYTES * shape.vocabulary
    return Memory(shape.weight_bytes, int(kv), int(compute), runtime)


def fit_context(
    shape: Shape, wanted: int | None, available: int, *, kv_type: str = "f16", outputs: int = OUTPUTS
) -> int:
    """The context to load with: `wanted`, or as much of the default as fits into `available` bytes.

    Raises:
        DoesNotFit: with the numbers. A context that was asked for is never made smaller in silence.
    """
    usable = int(available * (1 - RESERVE))
    context = wanted or min(DEFAULT_CONTEXT, shape.trained_context or DEFAULT_CONTEXT)
    while memory(shape, context=context, kv_type=kv_type, outputs=outputs).total > usable:
        if wanted or context // 2 < SMALLEST_CONTEXT:
            needed = memory(shape, context=context, kv_type=kv_type, outputs=outputs).total
            raise DoesNotFit(f"{shape.architecture} with a context of {context} tokens", needed, usable)
        context //= 2
    return context


# -- speed -------------------------------------------------------------------------------------------

# Arithmetic speed of llama.cpp's kernels by weight type, against its Q8_0 kernel: (prefill, decode).
# Measured with benchmarks/planner.py on x86-64; types not listed are taken as the slowest.
_KERNELS = {
    "Q8_0": (1.0, 1.0),
    "Q4_0": (1.2, 1.2),
    "Q4_K": (0.8, 0.8),
    "Q6_K": (0.6, 0.7),
    "Q4_1": (0.38, 0.75),
    "Q5_0": (0.35, 0.6),
    "Q5_1": (0.35, 0.6),
    "F16": (0.25, 0.4),
    "F32": (0.25, 0.25),
}
_SLOWEST = (0.3, 0.5)
# One token at a time re-uses nothing that it loads, so the multipliers idle.
_DECODE_SHARE = 0.16


def predict(
    shape: Shape,
    device: Device,
    *,
    quantization: str = "",
    context: int = DEFAULT_CONTEXT,
    kv_type: str = "f16",
    streams: int = 1,
) -> Prediction:
    """Memory and speed of a model (already in its quantized shape) on a device.

    Args:
        context: tokens that each of the streams holds.
        streams: sequences decoded together; the speeds are those of each.
    """
    matmuls = [t for t in shape.tensors if t.rows > 1 and (shape.tied or role_of(t.name) != "embedding")]
    prefill = sum(
        2 * t.count / (device.int8_ops * _kernel(t)[0]) for t in matmuls if not _is_output(t, shape)
    )
    alone = sum(2 * t.count / (device.int8_ops * _DECODE_SHARE * _kernel(t)[1]) for t in matmuls)
    together = sum(2 * t.count / (device.int8_ops * _kernel(t)[0]) for t in matmuls)
    arithmetic = max(
        alone, streams * together
    )  # rows of one step share what is loaded, as those of a prompt do
    needed = memory(shape, context=context * streams, kv_type=kv_type)
    reading = (sum(t.nbytes for t in matmuls) + needed.kv * 0.25) / device.bandwidth  # caches are rarely full
    return Prediction(
        quantization=quantization,
        memory=needed,
        context=context,
        prefill=1 / prefill / streams if prefill else 0.0,
        decode=1 / max(arithmetic, reading),
        limit="memory bandwidth" if reading > arithmetic else "arithmetic",
        streams=streams,
        kl=_kl(shape, imatrix="+" in quantization),
    )


# Relative squared error of each type on normally distributed weights, measured with ggml's own quantizer.
_NOISE = {
    "F64": 0.0,
    "F32": 0.0,
    "F16": 4e-8,
    "BF16": 2.8e-6,
    "Q8_0": 2.9e-5,
    "Q6_K": 3.1e-4,
    "Q5_K": 1.3e-3,
    "Q5_1": 1.4e-3,
    "Q5_0": 1.8e-3,
    "Q4_K": 5.1e-3,
    "Q4_1": 6.1e-3,
    "Q4_0": 7.4e-3,
    "Q3_K": 2.3e-2,
    "Q2_K": 8.8e-2,
    "IQ4_NL": 5.7e-3,
    "IQ4_XS": 5.8e-3,
    "MXFP4": 1.3e-2,
    "IQ3_S": 1.9e-2,
    "IQ3_XXS": 3.3e-2,
    "IQ2_S": 6.2e-2,
    "IQ2_XS": 9.1e-2,
    "IQ2_XXS": 0.12,
    "IQ1_M": 0.21,
    "IQ1_S": 0.24,
    "TQ2_0": 0.65,
    "TQ1_0": 0.65,
}
# Nats per unit of error at 135 M parameters, and what 8-bit activations cost in any form. From the KL of SmolLM2
# at Q8_0, Q4_K_M and Q4_0; larger models lose less, about as the square root of their size.
_KL_PER_NOISE = 46.0
_KL_FLOOR = 0.0035
_KL_IMATRIX = 0.65


def _kl(shape: Shape, *, imatrix: bool) -> float:
    """A prior for the mean KL to the float model, nats."""
    matrices = [t for t in shape.tensors if t.rows > 1]
    count = sum(t.count for t in matrices)
    if not count:
        return 0.0
    noise = sum(t.count * _NOISE.get(t.type, 0.01) for t in matrices) / count
    smaller = min(1.0, math.sqrt(135e6 / count))
    floor = 0.0 if all(t.type in ("F64", "F32", "F16", "BF16") for t in matrices) else _KL_FLOOR
    return smaller * (floor + _KL_PER_NOISE * noise * (_KL_IMATRIX if imatrix else 1.0))


def _kernel(t: Matrix) -> tuple[float, float]:
    return _KERNELS.get(t.type, _SLOWEST)


def _is_output(t: Matrix, shape: Shape) -> bool:
    role = role_of(t.name)
    return role == "output" or (shape.tied and role == "embedding")


def plan(
    shape: Shape,
    device: Device,
    *,
    types: Iterable[str] = WORTH_TRYING,
    context: int = DEFAULT_CONTEXT,
    min_speed: float = 0.0,
    max_memory: int | None = None,
    streams: int = 1,
    distinct: bool = True,
) -> list[Prediction]:
    """The forms of a model that are worth building for a device, in the order of `types`.

    On this machine memory is going to be measured, so a form is left out only if it does not fit with all the doubt
    that there is; elsewhere the prediction is what counts.

    Args:
        types: names of forms, better ones first (see Form).
        distinct: leave out types that come out the same size or larger than a better one before them (k-quants
            fall back to larger types where rows are no multiple of 256).
        min_speed: decode of each of `streams`, tokens/s.

    Raises:
        DoesNotFit: not even the smallest fits; the numbers say by how much.
        BadInput: none reaches `min_speed` (tokens/s, predicted, with a factor of two of doubt).
    """
    limit = min(device.available_bytes, max_memory or device.available_bytes)
    found: list[Prediction] = []
    smallest, kept = float("inf"), ""
    for name in types:
        form = Form.parse(name)
        shaped = quantized(shape, form.name)
        if form.type != kept:
            if distinct and shaped.weight_bytes >= 0.98 * smallest:
                continue
            smallest, kept = shaped.weight_bytes, form.type
        found.append(predict(shaped, device, quantization=form.name, context=context, streams=streams))
    doubt = MEMORY_DOUBT if device.id == "this" else 0.0
    fitting = [p for p in found if (1 - doubt) * p.memory.total <= limit]
    if not fitting:
        least = min(found, key=lambda p: p.memory.total)
        raise DoesNotFit(
            f"{shape.architecture} with {shape.parameters / 1e6:,.0f} M parameters, "
            f"even at {least.quantization}, on {device.name}",
            least.memory.total,
            limit,
            hint=_what_binds(least, limit, device),
        )
    fast = [p for p in fitting if 2 * p.decode >= min_speed]
    if not fast:
        best = max(fitting, key=lambda p: p.decode)
        raise BadInput(
            f"no form reaches {min_speed:g} tokens/s on {device.name}: {best.quantization} is predicted at "
            f"{best.decode:.1f}, bounded by {best.limit}",
            hint=f"Lower --min-speed by {1 - best.decode / min_speed:.0%}, or use a smaller model.",
        )
    return fast


def _what_binds(least: Prediction, limit: int, device: Device) -> str:
    """Which limit on memory it is, by how much it is missed, and whether a smaller context would do."""
    name = "--max-memory" if limit < device.available_bytes else f"the memory of {device.name}"
    over = f"{name} is the limit that binds, by {(least.memory.total - limit) / 1e6:,.0f} MB."
    if least.memory.total - least.memory.kv < limit and least.memory.kv:
        per_token = least.memory.kv / (least.context * least.streams)
        fits = int((limit - least.memory.total + least.memory.kv) / per_token) // least.streams
        if fits >= SMALLEST_CONTEXT:
            return f"{over} A context of {fits // 256 * 256} tokens would fit."
    return f"{over} Use a smaller model or context, or a device with more memory."
