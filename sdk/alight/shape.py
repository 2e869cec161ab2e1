"""The sizes of a model: what memory and speed depend on, and how quantization changes it.

Everything here comes from a GGUF header or a config.json; no weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alight.errors import BadInput, InvalidModelFile, nearest
from alight.gguf import TYPES, GGUFHeader


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


@dataclass(frozen=True, slots=True)
class Form:
    """A quantization type, with or without an importance matrix: "Q4_K_M" or "Q4_K_M+imatrix".

    Raises:
        BadInput: the type rounds every weight alike, so that it has no use for an importance matrix.
    """

    type: str
    imatrix: bool = False

    def __post_init__(self) -> None:
        if self.imatrix and not takes_imatrix(self.type):
            raise BadInput(
                f"{self.type} has no use for an importance matrix",
                hint=f"Those that have: {', '.join(filter(takes_imatrix, QUANT_TYPES))}.",
            )

    @property
    def name(self) -> str:
        return f"{self.type}+imatrix" if self.imatrix else self.type

    @classmethod
    def parse(cls, text: str) -> Form:
        """The form that people write as "q4_k_m" or "q4_k_m+imatrix"."""
        kind, plus, more = text.partition("+")
        if plus and more.lower() != "imatrix":
            raise BadInput(f"unknown form {text!r}", hint=f"Write it as {kind} or {kind}+imatrix.")
        return cls(quant_type(kind), bool(plus))


def takes_imatrix(kind: str) -> bool:
    """Whether llama.cpp's quantizer weighs errors by an importance matrix for this type."""
    return kind not in ("F32", "F16", "Q8_0")
