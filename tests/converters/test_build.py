"""Builds on real weights: candidates measured against the source, the choice explained and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import checkpoint

import alight
from alight import devices, paths
from alight.builder import BuildRequest, Candidate
from alight.errors import BadInput, DiskFull, DoesNotFit, EngineError, Unsupported
from alight.evaluate import Quality, Speed
from alight.planner import Memory, Prediction
from alight.store import Store
from alight_converters.build import choose
from alight_converters.quantize.gguf import quantize

TEXT = "A short walk in the park is good for the heart, and a long one is better. Dogs know this well. " * 6


def test_build_end_to_end() -> None:
    told: list[str] = []
    result = alight.build(
        "builtin:smollm2",
        name="small",
        device="raspberry-pi-5-4gb",
        types=("Q8_0", "Q4_0"),
        text=TEXT,
        tokens=128,
        context=512,
        progress=lambda what, done, total: told.append(what),
    )
    q8, q4 = result.candidates
    assert q8.quality.kl_mean and q4.quality.kl_mean
    assert q8.quality.kl_mean < 0.02 < q4.quality.kl_mean
    assert result.chosen is q8, result.reason
    assert "at most 0.05" in result.reason
    artifact = Store().get("small")
    assert artifact.digest == result.artifact.digest
    assert artifact.lineage == Store().get("smollm2").lineage, "the same model in another form"
    assert artifact.description.quantization == "Q8_0"
    report = artifact.report
    assert report is not None
    assert report["chosen"] == "Q8_0"
    assert report["device"]["id"] == "raspberry-pi-5-4gb"
    assert [c["quantization"] for c in report["candidates"]] == ["Q8_0", "Q4_0"]
    assert "float32" in report["quality_measured_on"]
    assert {"Q8_0", "Q4_0", "source"} <= set(told)
    assert list((paths.home() / "build").iterdir()) == [], "nothing is left behind"
    with alight.load("small", context=256) as model:
        assert model.complete("Hello", max_tokens=2).usage.completion_tokens


def candidate(name: str, kl: float, speed: float) -> Candidate:
    memory = Memory(1, 1, 1, 1)
    return Candidate(
        name, 100, Prediction(name, memory, 512, 1.0, speed / 2, "arithmetic"), Quality(9, 5.0, kl, kl, 0.9),
        Speed(1.0, speed, 1.0, 9, 1), 0.1,
    )  # fmt: skip


def request(smollm2: alight.Artifact, **limits: object) -> BuildRequest:
    here = replace(devices.profile("raspberry-pi-5-8gb"), id="this")
    return BuildRequest(source=smollm2, device=here, name="x", **limits)  # type: ignore[arg-type]


def test_choice_is_the_fastest_that_is_good_enough(smollm2: alight.Artifact) -> None:
    best, good, fast = candidate("Q8_0", 0.004, 10), candidate("Q4_K_M", 0.04, 20), candidate("Q4_0", 0.2, 30)
    everything = [best, good, fast]
    assert choose(everything, request(smollm2))[0] is good
    assert choose(everything, request(smollm2, max_kl=0.01))[0] is best
    assert choose(everything, request(smollm2, max_kl=1.0))[0] is fast
    assert choose(everything, request(smollm2, max_kl=0.001))[0] is best, (
        "none is good enough: the least loss"
    )
    assert choose(everything, request(smollm2, min_speed=25))[0] is fast
    elsewhere = replace(request(smollm2, min_speed=12), device=devices.profile("raspberry-pi-5-8gb"))
    assert choose(everything, elsewhere)[0] is fast, "on another device the prediction counts"
    with pytest.raises(BadInput, match=r"no form reaches 99 tokens/s .* Q4_0 comes nearest with 30\.0"):
        choose(everything, request(smollm2, min_speed=99))


def test_impossible_budgets_are_told_before_any_work() -> None:
    with pytest.raises(DoesNotFit, match="even at Q4_0"):
        alight.build("builtin:smollm2", device="raspberry-pi-5-2gb", max_memory=50_000_000)
    with pytest.raises(BadInput, match="unknown build option 'min_sped'"):
        alight.build("builtin:smollm2", min_sped=3)
    with pytest.raises(BadInput, match="not a model name"):
        alight.build("builtin:smollm2", name="Bad Name!")


def test_checkpoints_are_not_converted_yet(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    checkpoint(folder)
    with pytest.raises(Unsupported, match="checkpoint"):
        alight.build(str(folder), device="raspberry-pi-5-2gb")


def test_the_quantizer_says_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineError, match=r"cannot quantize bad\.gguf to Q8_0"):
        quantize(bad, tmp_path / "out.gguf", "Q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_the_quantizer_on_a_full_disk(smollm2_file: Path, small_disk: Path) -> None:
    with pytest.raises(DiskFull):
        quantize(smollm2_file, small_disk / "out.gguf", "Q8_0")
    assert list(small_disk.iterdir()) == []
