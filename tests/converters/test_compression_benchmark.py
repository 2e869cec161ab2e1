"""The compression benchmark's own logic: rows that are kept as they come, budgets, forms. It measures nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # its files are scripts, not a package

import compression
import torch
from compression_untrained import untrained

from alight.builder import Candidate
from alight.evaluate import Quality, Speed
from alight.gguf import read_header
from alight.planner import Memory, Prediction
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint


def test_each_row_is_on_disk_when_it_is_told(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    first = compression.Rows(file)
    first.add("imatrix Q4_0", "alight < none", True, none=0.25, alight=0.155)
    assert json.loads(file.read_text())["imatrix Q4_0"]["met"] is True

    again = compression.Rows(file)  # a run of another section goes on with what is there
    again.add("search, in all", "7 of 8", False, found=6)
    assert again.table().splitlines()[2:] == [
        "| imatrix Q4_0 | none 0.2500, alight 0.1550 | alight < none | yes |",
        "| search, in all | found 6 | 7 of 8 | no |",
    ]


def test_limits_lie_between_the_smallest_and_the_largest_form() -> None:
    prediction = Prediction("Q4_0", Memory(1, 1, 1, 1), 512, 1.0, 1.0, "arithmetic")
    speed = Speed(1.0, 1.0, 1.0, 9, 1)
    small = Candidate("Q4_0", 1, prediction, Quality(9, 5.0, 0.1, 0.1, 0.9), speed, 0.1, memory_bytes=100)
    forms = [small, replace(small, quantization="Q8_0", memory_bytes=200)]
    limits = [compression._limit(forms, budget) for budget in compression.BUDGETS]
    assert len(limits) == 8
    assert limits.count(None) == 5
    assert all(100 < limit < 200 for limit in limits if limit)


def test_forms_without_training(tiny: Checkpoint, tmp_path: Path) -> None:
    rows = Calibration(torch.arange(64).reshape(4, 16), "numbers")
    weights = {}
    for form, file in untrained(tiny, rows, tmp_path, ("awq+imatrix", "imatrix", "rounded")):
        types = {t.name: t.type for t in read_header(file).tensors}
        assert (types["blk.0.ffn_up.weight"], types["token_embd.weight"]) == ("Q4_0", "Q8_0")
        weights[form] = file.read_bytes()
    assert list(weights) == ["rounded", "imatrix", "awq+imatrix"]
    assert len(set(weights.values())) == 3
    assert not list(tmp_path.glob("*.gguf"))
