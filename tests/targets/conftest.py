"""ONNX folders that the tests of the onnx target share, made by alight's own exporter."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoints

from alight_converters.checkpoint import Checkpoint
from alight_converters.export import onnx
from alight_converters.sources import open_source


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers, float32, trained for 256 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = Checkpoint.open(tiny_checkpoints.save(folder / "hf", tiny_checkpoints.llama_config()))
    onnx.export(checkpoint, folder / "tiny", onnx.Precision("fp32"))
    return folder / "tiny"


@pytest.fixture(scope="session")
def smollm2_onnx(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M-Instruct at int4."""
    folder = tmp_path_factory.mktemp("smollm2-onnx")
    onnx.export(open_source(smollm2_file, folder), folder / "smollm2", onnx.Precision("int4"))
    return folder / "smollm2"
