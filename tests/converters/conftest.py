"""Checkpoints that the converters' tests share: a tiny random one, and the real SmolLM2."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoints
import torch

from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.sources import open_source


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    """A Llama of 4 layers with random float32 weights."""
    return Checkpoint.open(tiny_checkpoints.save(tmp_path / "tiny", tiny_checkpoints.llama_config()))


@pytest.fixture
def random_rows() -> Calibration:
    """16 rows of 32 tokens of the tiny checkpoint's vocabulary."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, tiny_checkpoints.VOCABULARY, (16, 32), generator=generator)
    return Calibration(rows, "random tokens")


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The real SmolLM2-135M-Instruct in float32, from the GGUF that its package carries."""
    return open_source(smollm2_file, tmp_path_factory.mktemp("smollm2"))
