"""What the tests of MLC libraries share: exported models with a library for this machine, and what they should say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alight_converters.checkpoint import Checkpoint
from alight_converters.compile_mlc import compile_library
from alight_converters.export.mlc import export
from alight_converters.export.mlc_modes import GROUP, MODES, quantize, to_bfloat16
from alight_targets.mlc.backend import TvmBackend
from alight_targets.mlc.libraries import choose


def build(
    checkpoint: Checkpoint, folder: Path, mode: str, context: int = 128, target: str = "native"
) -> Path:
    """Export and compile; returns the folder."""
    export(checkpoint, folder, mode, context=context)
    config = json.loads((folder / "mlc-chat-config.json").read_text())
    compile_library(config, mode, target, folder, context=context)
    return folder


def backend(folder: Path, slots: int = 4) -> TvmBackend:
    library = choose(folder)
    return TvmBackend(folder, library, context=library.context, slots=slots, threads=1)


def reference(checkpoint: Checkpoint, mode: str) -> Any:
    """The model in transformers, in float32, with the weights that the mode makes of them."""
    model = checkpoint.load()
    with torch.no_grad():
        for parameter in model.parameters():
            offset = (
                checkpoint.family.norm_offset if parameter.ndim == 1 else 0.0
            )  # MLC holds Gemma's norms whole
            parameter.copy_(torch.from_numpy(_rounded(parameter.numpy() + np.float32(offset), mode) - offset))
    return model


def _rounded(weight: np.ndarray, mode: str) -> np.ndarray:
    """Through the mode and back. Files hold float32 as bfloat16."""
    chosen = MODES[mode]
    weight = weight.astype(chosen.float_type)
    if not chosen.quantized or weight.ndim == 1:
        return _stored(weight)
    words, scales = quantize(weight)
    digits = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    numbers = digits.reshape(len(weight), -1).astype(np.float32) - 7
    return (numbers * np.repeat(_stored(scales), GROUP, axis=1))[:, : weight.shape[1]]


def _stored(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.float16:
        return values.astype(np.float32)
    return (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, by transformers."""
    found = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
    )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


def continued(engine: TvmBackend, prompt: list[int], count: int) -> list[int]:
    engine.add(0)
    row, found = engine.extend(0, prompt), []
    while True:
        found.append(int(row.argmax()))
        if len(found) == count:
            break
        row = engine.decode([0], found[-1:])[0]
    engine.remove(0)
    return found
