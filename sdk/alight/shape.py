"""The sizes of a model: what memory and speed depend on.

Everything here comes from a GGUF header or a config.json; no weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alight.errors import InvalidModelFile
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
    group: int  # query heads that share a key
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
    kv_heads = number("attention.head_count_kv", heads)
    hidden = number("embedding_length")
    head_width = number("attention.key_length", hidden // heads)
    vocabulary = next((t.rows for t in tensors if t.name == "token_embd.weight"), 0)
    return Shape(
        architecture=head.architecture,
        layers=number("block_count"),
        hidden=hidden,
        ffn=number("feed_forward_length", 0),
        group=heads // kv_heads if kv_heads else 1,
        kv_width=head_width * kv_heads,
        vocabulary=vocabulary,
        trained_context=number("context_length", 0),
        tied="output.weight" not in names,
        tensors=tensors,
    )


def shape_of_checkpoint(files: Mapping[str, Path]) -> Shape:
    """The shape of a Hugging Face checkpoint, from its config.json and safetensors headers alone.

    Of a model that sees, the shape of its language model: that is what a GGUF of it holds.

    Raises:
        InvalidModelFile: config.json or a safetensors header is missing or damaged.
    """
    if "config.json" not in files:
        raise InvalidModelFile("the checkpoint has no config.json", hint="Give the folder that holds it.")
    try:
        config = json.loads(files["config.json"].read_text())
        config = config.get("text_config") or config
        tensors = _language_model(
            m
            for path, file in sorted(files.items())
            if path.endswith(".safetensors")
            for m in _safetensors(file)
        )

        def rows(name: str) -> int:
            return next((t.rows for t in tensors if t.name.endswith(name)), 0)

        hidden = int(config["hidden_size"])
        # Configs leave out what is the default of their family (those of Gemma 3 do), so tensors come first.
        queries, keys = rows("q_proj.weight"), rows("k_proj.weight")
        if not (queries and keys):
            heads = int(config["num_attention_heads"])
            width = int(config.get("head_dim") or hidden // heads)
            queries, keys = width * heads, width * int(config.get("num_key_value_heads") or heads)
        return Shape(
            architecture=str(config.get("model_type", "unknown")),
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(config.get("intermediate_size") or 4 * hidden),
            group=queries // keys,
            kv_width=keys,
            vocabulary=int(config.get("vocab_size") or rows("embed_tokens.weight")),
            trained_context=int(config.get("max_position_embeddings") or 0),
            tied=not any(t.name == "output.weight" or t.name.endswith("lm_head.weight") for t in tensors),
            tensors=tensors,
        )
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InvalidModelFile(f"config.json of the checkpoint is not usable: {error!r}") from error


_LANGUAGE_MODEL = ("model.language_model.", "language_model.")  # before its tensors, where a model also sees


def _language_model(tensors: Iterable[Matrix]) -> tuple[Matrix, ...]:
    found = tuple(tensors)
    own = tuple(t for t in found if t.name.startswith((*_LANGUAGE_MODEL, "lm_head.")))
    return own if any(t.name.startswith(_LANGUAGE_MODEL) for t in own) else found


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
