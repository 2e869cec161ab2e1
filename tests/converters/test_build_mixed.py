"""A search whose memory ends between two types tries a type for each tensor, and tells how sensitive each is."""

from __future__ import annotations

from pathlib import Path

import pytest

import alight
from alight import devices, planner
from alight.builder import BuildResult
from alight.gguf import read_header
from alight_converters.checkpoint import Checkpoint

PI = "raspberry-pi-5-4gb"


def memory_of(checkpoint: Checkpoint, kind: str) -> int:
    """As it is predicted for another device."""
    shape = planner.shape_of_checkpoint({f.name: f for f in checkpoint.folder.iterdir()})
    (found,) = planner.plan(shape, devices.profile(PI), types=(kind,), context=64)
    return found.memory.total


def build(checkpoint: Checkpoint, name: str, **limits: float) -> BuildResult:
    return alight.build(checkpoint.folder, name=name, device=PI, tokens=64, context=64, **limits)


def test_memory_between_two_types_is_used_by_a_mix(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = memory_of(tiny, "Q4_0"), memory_of(tiny, "Q8_0")
    limit = small + 2 * (large - small) // 3
    result = build(tiny, "mixed", max_memory=limit, max_kl=1e-9)
    *uniform, mix = result.candidates
    assert mix.quantization.startswith("mixed-")
    assert mix.prediction.memory.total <= limit < large
    assert mix.prediction.memory.total > max(c.prediction.memory.total for c in uniform)
    assert mix.quality.kl_mean is not None
    assert all(mix.quality.kl_mean < (c.quality.kl_mean or 0) for c in uniform)
    assert result.chosen is mix, result.reason
    header = read_header(result.artifact.weights[0])
    assert sum(t.nbytes for t in header.tensors) == mix.prediction.memory.weights, "as it was predicted"
    assert len({t.type for t in header.tensors}) > 2

    report = result.artifact.report
    assert report is not None
    (stage,) = report["stages"]
    assert set(stage["measured"]["tensors"]) == {t.name for t in header.tensors if len(t.shape) > 1}
    assert report["settings"]["sensitivity"] == "measured"
    assert "sensitivity of the tensors" in result.artifact.files["report.html"].read_text()

    monkeypatch.setattr("alight_converters.quantize.sensitivity.measure", None)  # it is kept
    tighter = build(tiny, "tighter", max_memory=limit - (large - small) // 9, max_kl=1e-9)
    assert tighter.chosen.quantization.startswith("mixed-")
    assert tighter.chosen.size < mix.size


def test_where_one_type_will_do_nothing_is_mixed(tiny: Checkpoint) -> None:
    result = build(tiny, "within", max_memory=memory_of(tiny, "Q4_0") + 1000, max_kl=50.0)
    assert not any(c.quantization.startswith("mixed") for c in result.candidates)
    report = result.artifact.report
    assert report is not None
    assert report["stages"] == []
    assert report["settings"]["sensitivity"] == "not measured: one type for all tensors keeps the limits"
