"""Compiled MLC libraries compute what transformers computes with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import mlc_models
import numpy as np
import pytest
import tiny_checkpoints
import torch

from alight.errors import BadInput, InvalidModelFile, Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.compile_mlc import compile_library
from alight_converters.export.mlc_modes import MODES

FAMILIES = ("llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi4-mini")
CONTEXT = 64


def checkpoint(family: str, folder: Path) -> Checkpoint:
    config, tokens = tiny_checkpoints.families()[family]
    return Checkpoint.open(tiny_checkpoints.save(folder / family, config, tokens=tokens))


def logits_of(folder: Path, tokens: list[int], read: int) -> np.ndarray:
    """The logits after each token: `read` of them as a prompt, the others one by one."""
    engine = mlc_models.backend(folder)
    engine.add(0)
    rows = [engine.extend(0, tokens[:read])] + [engine.decode([0], [token])[0] for token in tokens[read:]]
    engine.close()
    return np.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    source = checkpoint(family, tmp_path)
    folder = mlc_models.build(source, tmp_path / "mlc", "q4f32_1", CONTEXT)
    tokens = [int(t) for t in np.random.default_rng(0).integers(2, 300, 40)]
    with torch.no_grad():
        expected = mlc_models.reference(source, "q4f32_1")(torch.tensor([tokens])).logits[0, 23:].numpy()
    np.testing.assert_allclose(logits_of(folder, tokens, read=24), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_computes_what_transformers_does(mode: str, tmp_path: Path) -> None:
    source = checkpoint("smollm2", tmp_path)
    folder = mlc_models.build(source, tmp_path / "mlc", mode, CONTEXT)
    tokens = [int(t) for t in np.random.default_rng(1).integers(2, 300, 30)]
    with torch.no_grad():
        expected = mlc_models.reference(source, mode)(torch.tensor([tokens])).logits[0, 19:].numpy()
    tolerance = 2e-2 if "f16" in mode else 2e-3  # keys and values are held in the mode's type
    np.testing.assert_allclose(logits_of(folder, tokens, read=20), expected, atol=tolerance, rtol=tolerance)
