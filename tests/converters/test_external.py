"""Libraries in environments of their own: what alight checks before, and what it makes of their failures."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from alight.errors import BadInput, EngineError, TargetUnavailable
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.quantize import external


def environment(folder: Path, script: str) -> Path:
    """An executable that imports anything, and runs `script` where a worker would run."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\ncase \"$1\" in -c) exit 0;; esac\nexec {sys.executable} -c '{script}'\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def test_without_an_environment_the_install_command_is_told(
    tiny: Checkpoint, random_rows: Calibration, tmp_path: Path
) -> None:
    def run(python: str, runtime: str = "vllm") -> None:
        external.quantize(tiny, tmp_path / "out", "W8A8", random_rows, runtime=runtime, python=python)

    with pytest.raises(TargetUnavailable, match=r"(?s)none is named.*pip install torch==\S+ llmcompressor=="):
        run("")
    with pytest.raises(TargetUnavailable, match="No such file"):
        run(str(tmp_path / "absent" / "python"))
    with pytest.raises(TargetUnavailable, match=r"(?s)has no lmdeploy.*pip install .*lmdeploy=="):
        run(sys.executable, "lmdeploy")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(tiny: Checkpoint, random_rows: Calibration, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"(?s)unknown runtime 'vlm'.*vllm"):
        external.quantize(tiny, tmp_path / "out", "W8A8", random_rows, runtime="vlm")
    with pytest.raises(BadInput, match=r"(?s)unknown scheme 'GPTQ' for lmdeploy.*AWQ, W8A8"):
        external.quantize(tiny, tmp_path / "out", "GPTQ", random_rows, runtime="lmdeploy")
    with pytest.raises(BadInput, match="exists already"):
        external.quantize(tiny, tiny.folder, "W8A8", random_rows, runtime="vllm")


def test_a_library_that_fails_leaves_nothing(
    tiny: Checkpoint, random_rows: Calibration, tmp_path: Path
) -> None:
    python = environment(tmp_path, 'import sys; print("loading"); sys.exit("no kernel for this device")')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(EngineError, match="llmcompressor cannot quantize tiny: loading; no kernel for this"):
        external.quantize(tiny, tmp_path / "out", "GPTQ", random_rows, runtime="vllm", python=python)
    silent = environment(tmp_path, "pass")
    with pytest.raises(EngineError, match=r"wrote no config\.json"):
        external.quantize(tiny, tmp_path / "out", "GPTQ", random_rows, runtime="vllm", python=silent)
    assert sorted(tmp_path.iterdir()) == before


def test_the_library_gets_the_calibration_rows_and_a_block_that_fits(
    tiny: Checkpoint, random_rows: Calibration, tmp_path: Path
) -> None:
    script = (
        "import json, pathlib, sys; r = json.load(sys.stdin); t = pathlib.Path(r[\"target\"]); t.mkdir(); "
        "r[\"size\"] = pathlib.Path(r[\"rows\"]).stat().st_size; (t / \"config.json\").write_text(json.dumps(r))"
    )  # fmt: skip
    python = environment(tmp_path, script)
    made = external.quantize(
        tiny, tmp_path / "out", "AWQ", random_rows, runtime="lmdeploy", python=python, device="npu"
    )
    asked = json.loads((made / "config.json").read_text())
    assert (asked["scheme"], asked["device"], asked["source"]) == ("AWQ", "npu", str(tiny.folder))
    assert asked["block"] == 32, "64 and 160 columns"
    assert asked["size"] > 8 * random_rows.tokens
    assert (made / "tokenizer.json").is_file(), "what the library leaves out is added"
    assert made.name == "out" and not list(tmp_path.glob(".out*"))
