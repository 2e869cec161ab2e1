"""Builds on real weights: candidates measured against the source, the choice explained and kept."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import alight
from alight import devices, paths
from alight.builder import BuildRequest, Candidate
from alight.errors import BadInput, DiskFull, DoesNotFit, EngineError
from alight.evaluate import Quality, Speed
from alight.planner import Memory, Prediction
from alight.store import Store
from alight_converters.build import choose
from alight_converters.checkpoint import Checkpoint
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
    assert [len(s["artifact"]) > 0 for s in report["samples"]] == [True] * 3
    assert report["settings"]["tokens"] == 128
    with alight.load("small", context=256) as model:
        assert model.complete("Hello", max_tokens=2).usage.completion_tokens

    told.clear()
    again = alight.build(
        "builtin:smollm2",
        name="fast",
        device="raspberry-pi-5-4gb",
        types=("Q8_0", "Q4_0"),
        max_kl=1.0,
        text=TEXT,
        tokens=128,
        context=512,
        progress=lambda what, done, total: told.append(what),
    )
    assert again.chosen.quantization == "Q4_0"
    assert [c.quality for c in again.candidates] == [q8.quality, q4.quality]
    assert told == [], "nothing is measured twice"


def candidate(name: str, kl: float, speed: float) -> Candidate:
    memory = Memory(1, 1, 1, 1)
    return Candidate(
        name, 100, Prediction(name, memory, 512, 1.0, speed / 2, "arithmetic"), Quality(9, 5.0, kl, kl, 0.9),
        Speed(1.0, speed, 1.0, 9, 1), 0.1,
    )  # fmt: skip


def request(file: Path, **limits: object) -> BuildRequest:
    here = replace(devices.profile("raspberry-pi-5-8gb"), id="this")
    return BuildRequest(source=alight.Artifact.loose(file), device=here, name="x", **limits)  # type: ignore[arg-type]


def test_choice_is_the_fastest_that_is_good_enough(smollm2_file: Path) -> None:
    best, good, fast = candidate("Q8_0", 0.004, 10), candidate("Q4_K_M", 0.04, 20), candidate("Q4_0", 0.2, 30)
    everything = [best, good, fast]
    assert choose(everything, request(smollm2_file))[0] is good
    assert choose(everything, request(smollm2_file, max_kl=0.01))[0] is best
    assert choose(everything, request(smollm2_file, max_kl=1.0))[0] is fast
    assert choose(everything, request(smollm2_file, max_kl=0.001))[0] is best, (
        "none is good enough: the least loss"
    )
    assert choose(everything, request(smollm2_file, min_speed=25))[0] is fast
    elsewhere = replace(request(smollm2_file, min_speed=12), device=devices.profile("raspberry-pi-5-8gb"))
    assert choose(everything, elsewhere)[0] is fast, "on another device the prediction counts"
    with pytest.raises(BadInput, match=r"no form reaches 99 tokens/s .* Q4_0 comes nearest with 30\.0"):
        choose(everything, request(smollm2_file, min_speed=99))


def test_impossible_budgets_are_told_before_any_work() -> None:
    with pytest.raises(DoesNotFit, match="even at Q2_K"):
        alight.build("builtin:smollm2", device="raspberry-pi-5-2gb", max_memory=50_000_000)
    with pytest.raises(BadInput, match="unknown build option 'min_sped'"):
        alight.build("builtin:smollm2", min_sped=3)
    with pytest.raises(BadInput, match="not a model name"):
        alight.build("builtin:smollm2", name="Bad Name!")


def test_a_checkpoint_folder_becomes_one_artifact(tiny: Checkpoint, tmp_path: Path) -> None:
    result = alight.build(
        tiny.folder, name="one", types=("q4_0+imatrix",), tokens=64, context=64, folder=tmp_path / "out"
    )
    assert [c.quantization for c in result.candidates] == ["Q4_0+imatrix"]
    assert result.artifact.lineage == alight.pull(str(tiny.folder)).lineage, "the same model in another form"
    assert "sampled from" in result.artifact.report["settings"]["calibration"]  # type: ignore[index]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "model.gguf",
        "report.html",
        "report.json",
    ]
    with alight.load(tmp_path / "out" / "model.gguf", context=64) as model:
        assert model.complete("The", max_tokens=4, ignore_eos=True).usage.completion_tokens == 4
    with pytest.raises(BadInput, match="exists already"):
        alight.build(tiny.folder, types=("Q8_0",), folder=tmp_path / "out")


def test_a_pulled_checkpoint_is_searched(tiny: Checkpoint) -> None:
    pulled = alight.pull(str(tiny.folder), name="pulled")
    result = alight.build(
        "pulled", name="best", device="raspberry-pi-5-4gb", tokens=64, context=64, max_kl=50.0
    )
    assert result.artifact.lineage == pulled.lineage, "the same model in another form"
    assert len(result.candidates) >= 3
    assert result.chosen in result.candidates
    assert set(result.front) <= set(result.candidates)
    fastest = max(c.prediction.decode for c in result.candidates)
    assert result.chosen.prediction.decode >= 0.97 * fastest, "every form keeps so large a KL"


def test_a_calibration_text_must_be_of_use(tiny: Checkpoint) -> None:
    with pytest.raises(BadInput, match="no importance matrix is made from it") as caught:
        alight.build(tiny.folder, types=("Q4_0",), calibration=TEXT, context=64)
    assert "q4_0+imatrix" in caught.value.hint
    with pytest.raises(BadInput, match="the calibration text has"):
        alight.build(tiny.folder, types=("Q4_0+imatrix",), calibration="too short", tokens=64, context=64)
    with pytest.raises(BadInput, match="Q8_0 has no use for an importance matrix"):
        alight.build(tiny.folder, types=("Q8_0+imatrix",), context=64)


KILLED = """
import os, signal, sys, alight

def progress(what, done, total):
    if what.startswith("speed of"):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))

alight.build(sys.argv[1], name="never", types=("Q8_0",), tokens=64, context=64, progress=progress)
"""


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGINT"])
def test_an_interrupted_build_leaves_nothing(tiny: Checkpoint, kind: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tiny.folder), kind]
    assert subprocess.run(command, capture_output=True, check=False).returncode in (1, -getattr(signal, kind))
    assert Store().names() == []
    alight.build(tiny.folder, name="then", types=("Q8_0",), tokens=64, context=64)
    assert list((paths.home() / "build").iterdir()) == []


def test_recipes_say_their_options_themselves(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"max_kl, tokens is given beside a recipe"):
        alight.build(tmp_path / "r.yaml", tokens=64, max_kl=1.0)
    with pytest.raises(BadInput, match="cannot read the recipe"):
        alight.build(tmp_path / "r.yaml")


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
