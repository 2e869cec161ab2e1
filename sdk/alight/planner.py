"""Predict memory and speed of a model on a device, and pick the form of it that fits.

Everything here comes from a GGUF header or a config.json; no weights are loaded. Memory is what
llama.cpp allocates: weights, KV cache, compute buffers. Speed is a roofline: a decode step reads every
weight once (memory bandwidth) and multiplies with it (arithmetic); prefill is arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alight.devices import Device
from alight.errors import BadInput, DoesNotFit, InvalidModelFile, nearest
from alight.gguf import TYPES, GGUFHeader

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
class Matrix:
    """One weight tensor: its place in the model, numbers per row, rows, and ggml type."""

    name: str
    columns: int
    rows: int
    type: str

    @property
    def count(self) -> int:
        return self.columns * self.rows

    @property
    def nbytes(self) -> int:
        block, size = _BLOCKS[self.type]
        return self.count // block * size


_BLOCKS = {name: (block, size) for name, block, size in TYPES.values()}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder that memory and speed depend on."""

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_width: int  # numbers per token and layer in the key cache (the value cache is taken as equal)
    vocabulary: int
    trained_context: int
    tied: bool  # the embedding is also the output matrix
    tensors: tuple[Matrix, ...]

    @property
    def parameters(self) -> int:
        return sum(t.count for t in self.tensors)

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


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
    """What a model in one form would be on a device. Speeds are tokens per second of one stream."""

    quantization: str
    memory: Memory
    context: int
    prefill: float
    decode: float
    limit: str  # what bounds decode: "memory bandwidth" or "arithmetic"


# -- shapes ------------------------------------------------------------------------------------------


def shape_of_gguf(headers: Sequence[GGUFHeader]) -> Shape:
    """The shape behind one GGUF file, or behind all parts of a split one.

    Raises:
        InvalidModelFile: a hyper-parameter is missing or of the wrong kind.
    """
    head = headers[0]
    tensors = tuple(
        Matrix(t.name, t.shape[0], t.count // t.shape[0], t.type)
        for header in headers
        for t in header.tensors
    )
    names = {t.name for t in tensors}

    def number(key: str, default: int | None = None) -> int:
        value = head.get(key, default)
        if isinstance(value, list) and value:  # some architectures give one number per layer
            value = max(value)
        if not isinstance(value, int) or value < 0:
            raise InvalidModelFile(
                f"the GGUF says {head.architecture}.{key} = {value!r}",
                hint="It must be a number: fetch it again.",
            )
        return value

    heads = number("attention.head_count", 1) or 1
    hidden = number("embedding_length")
    head_width = number("attention.key_length", hidden // heads)
    vocabulary = next((t.rows for t in tensors if t.name == "token_embd.weight"), 0)
    return Shape(
        architecture=head.architecture,
        layers=number("block_count"),
        hidden=hidden,
        ffn=number("feed_forward_length", 0),
        heads=heads,
        kv_width=head_width * number("attention.head_count_kv", heads),
        vocabulary=vocabulary,
        trained_context=number("context_length", 0),
        tied="output.weight" not in names,
        tensors=tensors,
    )


def shape_of_checkpoint(files: Mapping[str, Path]) -> Shape:
    """The shape of a Hugging Face checkpoint, from its config.json and safetensors headers alone.

    Raises:
        InvalidModelFile: config.json or a safetensors header is missing or damaged.
    """
    if "config.json" not in files:
        raise InvalidModelFile("the checkpoint has no config.json", hint="Give the folder that holds it.")
    try:
        config = json.loads(files["config.json"].read_text())
        tensors = tuple(
            m
            for path, file in sorted(files.items())
            if path.endswith(".safetensors")
            for m in _safetensors(file)
        )
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        head_width = int(config.get("head_dim") or hidden // heads)
        return Shape(
            architecture=str(config.get("model_type", "unknown")),
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(config.get("intermediate_size") or 4 * hidden),
            heads=heads,
            kv_width=head_width * int(config.get("num_key_value_heads") or heads),
            vocabulary=int(config["vocab_size"]),
            trained_context=int(config.get("max_position_embeddings") or 0),
            tied="lm_head.weight" not in {t.name for t in tensors},
            tensors=tensors,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModelFile(f"config.json of the checkpoint is not usable: {error!r}") from error


_SAFETENSORS_TYPES = {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16", "I64": "I64", "I32": "I32"}


def _safetensors(file: Path) -> Iterable[Matrix]:
    size = file.stat().st_size
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise InvalidModelFile(
                f"{file.name} is not a safetensors file, or is truncated", hint="Fetch it again."
            )
        header: dict[str, Any] = json.loads(data.read(length))
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["data_offsets"][1] > size - 8 - length:
            raise InvalidModelFile(
                f"{file.name} is truncated: {name} ends after the file does", hint="Fetch it again."
            )
        *rest, columns = info["shape"] or [1]
        rows = 1
        for n in rest:
            rows *= n
        yield Matrix(name, columns, rows, _SAFETENSORS_TYPES.get(info["dtype"], "F16"))


# -- quantization types ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QuantType:
    """A llama.cpp quantization: the ggml types it gives to tensors.

    `more` is the type of the tensors that llama.cpp keeps better (attention values and FFN outputs of
    some layers, share `more_share`); `output` that of the output matrix.
    """

    main: str
    output: str
    more: str = ""
    more_share: float = 0.0


QUANT_TYPES: dict[str, QuantType] = {
    "F32": QuantType("F32", "F32"),
    "F16": QuantType("F16", "F16"),
    "Q8_0": QuantType("Q8_0", "Q8_0"),
    "Q6_K": QuantType("Q6_K", "Q6_K"),
    "Q5_K_M": QuantType("Q5_K", "Q6_K", "Q6_K", 0.5),
    "Q5_0": QuantType("Q5_0", "Q6_K"),
    "Q4_K_M": QuantType("Q4_K", "Q6_K", "Q6_K", 0.5),
    "Q4_K_S": QuantType("Q4_K", "Q6_K", "Q5_K", 0.125),
    "Q4_1": QuantType("Q4_1", "Q6_K"),
    "Q4_0": QuantType("Q4_0", "Q6_K"),
    "Q3_K_M": QuantType("Q3_K", "Q6_K", "Q4_K", 1.0),
    "Q2_K": QuantType("Q2_K", "Q6_K", "Q3_K", 1.0),
}

# Tried for a build unless the user names types: the ones that are best at their size or speed.
WORTH_TRYING = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")

# What llama.cpp takes instead when a row is no multiple of 256 numbers.
_FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}


def quant_type(name: str) -> str:
    """The canonical name of a quantization type ("q4_k_m" -> "Q4_K_M")."""
    if name.upper() not in QUANT_TYPES:
        near = nearest(name, QUANT_TYPES)
        raise BadInput(
            f"unknown quantization type {name!r}",
            hint=f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(QUANT_TYPES)}.",
        )
    return name.upper()


def quantized(shape: Shape, name: str) -> Shape:
    """The same model as llama.cpp's quantizer would write it at type `name`."""
    kind = QUANT_TYPES[quant_type(name)]

    def changed(t: Matrix, index: int) -> Matrix:
        if t.rows == 1 or "norm" in t.name:
            return replace(t, type="F32")
        is_output = t.name in ("output.weight", "lm_head.weight")
        is_embedding = t.name in ("token_embd.weight", "model.embed_tokens.weight")
        better = any(part in t.name for part in ("attn_v.", "ffn_down.", "v_proj.", "down_proj."))
        wanted = kind.main
        if is_output or (is_embedding and shape.tied):
            wanted = kind.output
        elif better and kind.more and (index * kind.more_share) % 1 + kind.more_share >= 1:
            wanted = kind.more
        if t.columns % _BLOCKS[wanted][0]:
            wanted = _FALLBACK.get(wanted, "F16")
        if t.columns % _BLOCKS[wanted][0]:
            wanted = "F16"
        return replace(t, type=wanted)

    better_seen: dict[str, int] = {}
    tensors = []
    for t in shape.tensors:
        kind_of = t.name.rsplit(".", 2)[-2] if "." in t.name else t.name
        index = better_seen[kind_of] = better_seen.get(kind_of, -1) + 1
        tensors.append(changed(t, index))
    return replace(shape, tensors=tuple(tensors))


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
) -> Prediction:
    """Memory and single-stream speed of a model (already in its quantized shape) on a device."""
    matmuls = [t for t in shape.tensors if t.rows > 1 and (shape.tied or "token_embd" not in t.name)]
    prefill = sum(
        2 * t.count / (device.int8_ops * _kernel(t)[0]) for t in matmuls if not _is_output(t, shape)
    )
    arithmetic = sum(2 * t.count / (device.int8_ops * _DECODE_SHARE * _kernel(t)[1]) for t in matmuls)
    needed = memory(shape, context=context, kv_type=kv_type)
    reading = (sum(t.nbytes for t in matmuls) + needed.kv * 0.25) / device.bandwidth  # caches are rarely full
    return Prediction(
        quantization=quantization,
        memory=needed,
        context=context,
        prefill=1 / prefill if prefill else 0.0,
        decode=1 / max(arithmetic, reading),
        limit="memory bandwidth" if reading > arithmetic else "arithmetic",
    )


def _kernel(t: Matrix) -> tuple[float, float]:
    return _KERNELS.get(t.type, _SLOWEST)


def _is_output(t: Matrix, shape: Shape) -> bool:
    return t.name in ("output.weight", "lm_head.weight") or (shape.tied and t.name.startswith("token_embd"))


def plan(
    shape: Shape,
    device: Device,
    *,
    types: Iterable[str] = WORTH_TRYING,
    context: int = DEFAULT_CONTEXT,
    min_speed: float = 0.0,
    max_memory: int | None = None,
) -> list[Prediction]:
    """The forms of a model that are worth building for a device, largest first.

    Types that come out the same size or larger than a better one before them are left out (k-quants fall
    back to larger types where rows are no multiple of 256).

    Raises:
        DoesNotFit: not even the smallest fits; the numbers say by how much.
        BadInput: none reaches `min_speed` (tokens/s, predicted, with a factor of two of doubt).
    """
    limit = min(device.available_bytes, max_memory or device.available_bytes)
    found: list[Prediction] = []
    for name in types:
        form = quantized(shape, name)
        if found and form.weight_bytes >= 0.98 * found[-1].memory.weights:
            continue
        found.append(predict(form, device, quantization=name, context=context))
    fitting = [p for p in found if p.memory.total <= limit]
    if not fitting:
        raise DoesNotFit(
            f"{shape.architecture} with {shape.parameters / 1e6:,.0f} M parameters, "
            f"even at {found[-1].quantization}, on {device.name}",
            found[-1].memory.total,
            limit,
            hint="Use a smaller model or context, or a device with more memory.",
        )
    fast = [p for p in fitting if 2 * p.decode >= min_speed]
    if not fast:
        best = max(fitting, key=lambda p: p.decode)
        raise BadInput(
            f"no form reaches {min_speed:g} tokens/s on {device.name}: {best.quantization} is predicted at "
            f"{best.decode:.1f}, bounded by {best.limit}",
            hint="Lower --min-speed, or use a smaller model.",
        )
    return fast
