"""Write a checkpoint as GGUF, the format of llama.cpp.

The reader's way through: `export` collects metadata (gguf_metadata.py, gguf_tokenizer.py), lists the tensors
under llama.cpp's names, and streams them to disk, one in memory at a time.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from alight.errors import BadInput, DiskFull, InvalidModelFile
from alight_converters.checkpoint import SHARD, Checkpoint
from alight_converters.export.gguf_metadata import hyper_parameters
from alight_converters.export.gguf_tokenizer import vocabulary
from alight_converters.families import Family
from alight_converters.families.family import Config

_TYPES = {
    "F32": (torch.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "F16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
_HEADER_ROOM = 64 << 20  # bytes; more than metadata with the largest vocabularies takes


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor to write: its name in the GGUF, and where its values come from."""

    name: str
    shape: tuple[int, ...]
    source: str  # name in the checkpoint; empty where `values` are given
    values: torch.Tensor | None = None


def export(
    checkpoint: Checkpoint, target: Path, dtype: str = "F16", *, shard: int | None = None
) -> list[Path]:
    """Write `checkpoint` to `target`; matrices in `dtype` (F32, F16 or BF16), vectors in F32.

    The result is one file, or `NAME-00001-of-0000N.gguf` and so on where it is larger than `shard` bytes (2 GB
    unless told; 0: never split). Any of them appears only when all are complete; they replace older ones.

    Returns:
        The files, in order; llama.cpp is given the first.

    Raises:
        BadInput: unknown `dtype`, or weights that overflow it. InvalidModelFile: the checkpoint contradicts its
        config, or holds NaN. Unsupported: llama.cpp cannot run it exactly. DiskFull: no room.
    """
    if dtype not in _TYPES:
        raise BadInput(f"GGUF type {dtype!r} is not a float type", hint=f"Use one of {', '.join(_TYPES)}.")
    family, config = checkpoint.family, checkpoint.full_config
    checkpoint.check_shapes()
    parameters, rope = hyper_parameters(family, config)
    words = vocabulary(checkpoint)
    tensors = [_Tensor(name, tuple(t.shape), "", t) for name, t in rope.items()]
    tensors += [_Tensor(gguf_name(family, n), s, n) for n, s in _shapes(checkpoint, family).items()]
    target.parent.mkdir(parents=True, exist_ok=True)
    size = sum(math.prod(t.shape) * _TYPES[_kind(t, dtype)][0].itemsize for t in tensors)
    _check_room(target, size + _HEADER_ROOM)
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder:
        limit = SHARD if shard is None else shard
        writer = GGUFWriter(
            Path(folder) / target.name, family.gguf, split_max_size=limit if size > limit else 0
        )
        metadata = {
            "general.type": "model",
            "general.name": words.model_name,
            "general.file_type": int(_TYPES[dtype][2]),
        }
        metadata |= {f"{family.gguf}.{key}": value for key, value in parameters.items()} | words.metadata
        for key, value in metadata.items():
            _add(writer, key, value)
        try:
            files = _write(writer, checkpoint, tensors, dtype)
        except OSError as error:
            if error.errno == 28:
                raise DiskFull(target, 0, shutil.disk_usage(target.parent).free) from error
            raise
        return _publish(files, target.parent)


def gguf_name(family: Family, name: str) -> str:
    """A tensor's name in llama.cpp."""
    path, _, kind = name.rpartition(".")
    outside = {family.embedding: "token_embd", family.final_norm: "output_norm", family.head: "output"}
    if path in outside:
        return f"{outside[path]}.{kind}"
    inside = re.fullmatch(rf"{re.escape(family.layers)}\.(\d+)\.(.+)", path)
    module = family.gguf_modules.get(inside[2]) if inside else None
    if inside is None or module is None:
        raise InvalidModelFile(
            f"tensor {name!r} has no place in a {family.name} of llama.cpp",
            hint="If the model uses it, its family has to name it: docs/add-a-family.md.",
        )
    return f"blk.{inside[1]}.{module}.{kind}"


def to_gguf(family: Family, config: Config, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The values as llama.cpp wants them: norms whole, query and key rows in its order."""
    if family.norm_offset and _is_norm(family, name):
        return tensor.float() + family.norm_offset
    if heads := _rotated_heads(family, config, name):
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def from_gguf(family: Family, config: Config, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The other way: values as `transformers` wants them."""
    if family.norm_offset and _is_norm(family, name):
        return tensor.float() - family.norm_offset
    if heads := _rotated_heads(family, config, name):
        return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _is_norm(family: Family, name: str) -> bool:
    norms = (*family.norms, family.query_norm, family.key_norm, family.final_norm)
    return any(norm and name.endswith(f"{norm}.weight") for norm in norms)


def _rotated_heads(family: Family, config: Config, name: str) -> int:
    """How many heads the rows of a query or key matrix or bias are, if llama.cpp has them in another order."""
    if family.rope_in_pairs and f".{family.queries}." in name:
        return int(config["num_attention_heads"])
    if family.rope_in_pairs and f".{family.keys}." in name:
        return int(config["num_key_value_heads"])
    return 0


def _shapes(checkpoint: Checkpoint, family: Family) -> dict[str, tuple[int, ...]]:
    """What is written, in the order of use. A head that is tied to the embedding is left out."""
    tied = checkpoint.full_config["tie_word_embeddings"]

    def place(name: str) -> tuple[int, str]:
        layer = re.match(rf"{re.escape(family.layers)}\.(\d+)\.", name)
        return (int(layer[1]) if layer else -1 if family.embedding in name else 1 << 30, name)

    return {
        name: checkpoint.shapes[name]
        for name in sorted(checkpoint.shapes, key=place)
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name.startswith(f"{family.head}."))
    }


def _write(writer: GGUFWriter, checkpoint: Checkpoint, tensors: list[_Tensor], dtype: str) -> list[Path]:
    for t in tensors:
        kind = _kind(t, dtype)
        size = math.prod(t.shape) * _TYPES[kind][0].itemsize
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.uint16), size, raw_dtype=_TYPES[kind][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
        writer.write_tensor_data(_values(checkpoint, t, _kind(t, dtype)))
    writer.flush()
    for file in writer.fout or ():
        os.fsync(file.fileno())
    files = writer.format_shard_names(Path(str(writer.path)))
    writer.close()
    return files


def _kind(tensor: _Tensor, dtype: str) -> str:
    return "F32" if len(tensor.shape) == 1 else dtype  # vectors are small, and llama.cpp wants them exact


def _values(checkpoint: Checkpoint, tensor: _Tensor, kind: str) -> np.ndarray[Any, Any]:
    values = tensor.values
    if values is None:
        stored = checkpoint.tensor(tensor.source)
        if not torch.isfinite(stored).all():
            raise InvalidModelFile(
                f"tensor {tensor.source!r} of {checkpoint.folder.name} has NaN or infinite values",
                hint="The checkpoint is damaged, or its training diverged.",
            )
        values = to_gguf(checkpoint.family, checkpoint.full_config, tensor.source, stored)
    cast = values.to(_TYPES[kind][0]).contiguous()
    if kind == "F16" and not torch.isfinite(cast).all():
        raise BadInput(
            f"tensor {tensor.source!r} has values beyond ±65504, which F16 cannot hold",
            hint="Use BF16 or F32.",
        )
    return cast.view(torch.uint16).numpy() if kind == "BF16" else cast.numpy()


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise DiskFull(target, needed, free)


def _publish(files: list[Path], folder: Path) -> list[Path]:
    """Move complete files to where they belong; the first part last, since readers begin with it."""
    for file in reversed(files):
        file.rename(folder / file.name)
    return [folder / file.name for file in files]


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A metadata entry, of the GGUF type that its Python type stands for."""
    adders: Mapping[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)
