"""Write a checkpoint as MLC: the folder that mlc_llm, web-llm and alight's own target load.

The reader's way through: `export` lists the tensors under MLC's names (mlc_names.py), quantizes them one by one
(mlc_modes.py) into shards (mlc_shards.py), and describes model, tokenizer and conversations (mlc_config.py,
mlc_conversation.py). The code that runs the model is no part of it: alight_converters.compile_mlc makes that.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alight.errors import BadInput, DiskFull, InvalidModelFile
from alight_converters.checkpoint import Checkpoint
from alight_converters.export import mlc_config
from alight_converters.export.mlc_modes import Array, Mode, mode, quantize, quantized_shapes
from alight_converters.export.mlc_names import Parameter, count, parameters
from alight_converters.export.mlc_shards import ShardWriter
from alight_converters.export.whole_folder import whole_folder
from alight_converters.passes import Progress, silent
from alight_converters.tokenizer_files import (
    PIECES,
    SETTINGS,
    TEMPLATE,
    TOKENIZER,
    read_template,
    read_tokenizer,
)

# What mlc_llm knows as parts of a tokenizer, and copies too.
_TOKENIZER_FILES = (PIECES, TOKENIZER, "vocab.json", "merges.txt", "added_tokens.json", SETTINGS)
_AROUND = 64 << 20  # bytes; more than tokenizer and lists take


def export(
    checkpoint: Checkpoint,
    folder: Path,
    quantization: str = "q4f16_1",
    *,
    context: int | None = None,
    progress: Progress = silent,
) -> Path:
    """Write `checkpoint` to `folder`, which appears when it is complete.

    Args:
        quantization: q0f16, q0f32, q4f16_1 or q4f32_1.
        context: tokens that the model is announced for; None: as many as MLC computes exactly.

    Returns:
        The folder: `mlc-chat-config.json`, `tensor-cache.json` (and the same as `ndarray-cache.json`),
        `params_shard_*.bin`, and the tokenizer's files.

    Raises:
        BadInput: unknown `quantization`, `folder` exists, `context` is too large, or weights overflow the mode's float
        type. InvalidModelFile: the checkpoint contradicts its config, or holds NaN. Unsupported: MLC cannot run the
        model. DiskFull: no room.
    """
    with whole_folder(folder) as part:
        write(checkpoint, part, quantization, context=context, progress=progress)
    return folder


def write(
    checkpoint: Checkpoint,
    folder: Path,
    quantization: str,
    *,
    context: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """`export` into a folder that is there already, of which the caller takes care.

    Returns:
        The content of `mlc-chat-config.json`.
    """
    chosen = mode(quantization)
    size = mlc_config.context_size(checkpoint, context)
    checkpoint.check_shapes()
    tensors = parameters(checkpoint)
    tokenizer = read_tokenizer(checkpoint.folder)
    config = mlc_config.chat_config(checkpoint, chosen, size, tokenizer)
    _check_room(folder, _AROUND + sum(_bytes(p, chosen) for p in tensors))
    config["tokenizer_files"] = _write_tokenizer(checkpoint, folder, tokenizer)
    _write_weights(checkpoint, tensors, chosen, folder, progress)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / mlc_config.NAME).write_text(text, encoding="utf-8")
    return config


def _write_weights(
    checkpoint: Checkpoint, tensors: list[Parameter], chosen: Mode, folder: Path, progress: Progress
) -> None:
    shards = ShardWriter(folder)
    for number, parameter in enumerate(tensors):
        progress("writing MLC weights", number, len(tensors))
        rows = [_values(checkpoint, source, parameter.offset, chosen) for source in parameter.sources]
        if not _is_quantized(parameter, chosen):
            shards.add(parameter.name, np.concatenate(rows))
            continue
        # Rows are quantized each for itself, so the parts of a fused matrix may be, too.
        words, scales = zip(*map(quantize, rows), strict=True)
        module = parameter.name.removesuffix(".weight")
        shards.add(f"{module}.q_weight", np.concatenate(words))
        shards.add(f"{module}.q_scale", np.concatenate(scales))
    shards.close(count(tensors))
    progress("writing MLC weights", len(tensors), len(tensors))


def _values(checkpoint: Checkpoint, name: str, offset: float, chosen: Mode) -> Array:
    """A tensor in the mode's float type."""
    stored = checkpoint.tensor(name)
    if not torch.isfinite(stored).all():
        raise InvalidModelFile(
            f"tensor {name!r} of {checkpoint.folder.name} has NaN or infinite values",
            hint="The checkpoint is damaged, or its training diverged.",
        )
    values: Array = stored.float().numpy()
    if offset:
        values = values + np.float32(offset)
    with np.errstate(over="ignore"):
        cast = values.astype(chosen.float_type, copy=False)
    if not np.isfinite(cast).all():
        raise BadInput(
            f"tensor {name!r} has values beyond ±65504, which float16 cannot hold",
            hint=f"Use {chosen.name.replace('f16', 'f32')}.",
        )
    return cast


def _write_tokenizer(checkpoint: Checkpoint, folder: Path, tokenizer: dict[str, Any]) -> list[str]:
    """Returns the files that make up the tokenizer."""
    for name in _TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    if not (folder / TOKENIZER).exists():  # an older checkpoint with a SentencePiece model alone
        (folder / TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    if not (folder / SETTINGS).exists():
        (folder / SETTINGS).write_text("{}\n", encoding="utf-8")
    if template := read_template(checkpoint.folder):
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    return [name for name in _TOKENIZER_FILES if (folder / name).exists()]


def _is_quantized(parameter: Parameter, chosen: Mode) -> bool:
    return chosen.quantized and len(parameter.shape) == 2


def _bytes(parameter: Parameter, chosen: Mode) -> int:
    """On disk, where float32 is bfloat16."""
    if not _is_quantized(parameter, chosen):
        return 2 * math.prod(parameter.shape)
    words, scales = quantized_shapes(*parameter.shape)
    return 4 * math.prod(words) + 2 * math.prod(scales)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFull(folder, needed, free)
