"""Shared by the tests of the server and its workers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from gguf_writer import tiny

from alight import api
from alight.store import Store


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Registers the target "clock" (clock_target.py) for all processes that a test starts; gives the folder
    whose files tell it what to do."""
    plugin = tmp_path / "plugins"
    about = plugin / "clock_target-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: clock_target\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[alight.targets]\nclock = clock_target:ClockTarget\n")
    monkeypatch.syspath_prepend(str(plugin))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(plugin), str(Path(__file__).parent)]))
    assert str(Path(__file__).parent) in sys.path  # pytest's pythonpath
    folder = tmp_path / "clock"
    folder.mkdir()
    monkeypatch.setenv("CLOCK_FOLDER", str(folder))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with the models "tiny", "other" and "third", which only a target that reads no weights loads."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(tiny())
    store = Store(tmp_path / "alight-home" / "models")
    for name in ("tiny", "other", "third"):
        api.pull(str(file), name=name, store=store)
    return store
