"""Recipes that run: stages kept and resumed, artifacts measured, loaded and explained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pass

import alight
from alight import paths
from alight.errors import BadInput, DiskFull
from alight.store import Store
from alight_converters import Recipe
from alight_converters.build_workspace import cache
from alight_converters.checkpoint import Checkpoint
from alight_converters.recipe_files import read

Make = Callable[..., Recipe]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "runs.txt"


@pytest.fixture
def make(tmp_path: Path, tiny: Checkpoint, log: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A recipe of the tiny checkpoint with two passes that write down their runs."""
    monkeypatch.syspath_prepend(str(tiny_pass.register(tmp_path / "site")))

    def of(*passes: dict[str, Any], **changes: Any) -> Recipe:
        data = {
            "source": str(tiny.folder),
            "name": "made",
            "calibration": {"rows": 2, "length": 16},
            "evaluate": {"tokens": 64},
            "context": 64,
            "passes": [{"kind": "scale", "log": str(log), **p} for p in passes],
            "export": [{"format": "gguf", "type": "Q8_0"}],
        }
        return Recipe.parse(data | changes)

    return of


def runs(log: Path) -> list[str]:
    return log.read_text().splitlines()


def test_stages_are_kept_and_only_what_changed_runs_again(make: Make, log: Path) -> None:
    first = make({"factor": 2.0}, {"factor": 3.0}).run()
    assert runs(log) == ["scale 2", "scale 3"]
    again = make({"factor": 2.0}, {"factor": 3.0}).run()
    assert runs(log) == ["scale 2", "scale 3"], "nothing changed"
    assert again.candidates[0].quality == first.candidates[0].quality
    report = again.artifact.report
    assert report is not None
    assert [s["cached"] for s in report["stages"]] == [True, True]
    assert report["stages"][0]["measured"] == {"losses": [3.0, 2.0, 1.5]}
    assert report["settings"]["passes"][1]["factor"] == 3.0

    make({"factor": 2.0}, {"factor": 4.0}).run()
    assert runs(log)[2:] == ["scale 4"], "a changed last stage does not repeat the first"
    make({"factor": 2.0}, {"factor": 4.0}, seed=1).run()
    assert runs(log)[3:] == ["scale 2", "scale 4"], "another seed is another recipe"


def test_a_changed_file_beside_the_recipe_is_another_stage(make: Make, log: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside.txt"
    beside.write_text("one")
    plan = make({"factor": 2.0, "beside": str(beside)}).plan
    make({"factor": 2.0, "beside": str(beside)}).run()
    assert plan().stages[0].cached
    beside.write_text("two")
    assert not plan().stages[0].cached


def test_a_killed_build_leaves_nothing_visible_and_resumes(make: Make, log: Path, tmp_path: Path) -> None:
    recipe = make({"factor": 2.0}, {"factor": 3.0, "killed": True})
    data = recipe.model_dump(mode="json", by_alias=True)
    code = f"from alight_converters import Recipe; Recipe.parse({data!r}).run()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Store().names() == []
    assert recipe.run().artifact.name == "made"
    assert runs(log) == ["scale 2", "scale 3", "scale 3 resumed"]
    assert list((paths.home() / "build").iterdir()) == [], "the killed build's folder went, too"
    assert not list(cache().glob("stages/*/work"))


def test_errors_say_which_stage(make: Make, log: Path) -> None:
    with pytest.raises(BadInput, match=r"passes\[1\] \(scale\): the factor is refused\nGive another"):
        make({"factor": 2.0}, {"refuses": True}).run()
    assert Store().names() == []
    make({"factor": 2.0}, {"factor": 5.0}).run()
    assert runs(log) == ["scale 2", "scale 1", "scale 5"], "finished stages are kept"


def test_a_calibration_that_is_too_short(make: Make, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(BadInput, match=r"short\.txt has \d+ tokens"):
        make({"factor": 2.0}, calibration={"text": str(text), "rows": 9, "length": 64}).run()


def test_a_full_disk(make: Make, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGHT_HOME", str(small_disk / "home"))
    with pytest.raises(DiskFull):
        make({"factor": 2.0}).run()
    assert Store().names() == []
    assert not list((small_disk / "home").glob("build/*"))


def test_the_plan_tells_what_is_done(make: Make) -> None:
    recipe = make({"factor": 2.0}, {"factor": 3.0})
    before = recipe.plan()
    assert [s.cached for s in before.stages] == [False, False]
    assert all(s.seconds and s.memory for s in before.stages)
    assert [p.quantization for p in before.exports] == ["Q8_0"]
    assert not list(cache().glob("stages/*")), "a plan runs nothing"
    recipe.run()
    assert [s.cached for s in make({"factor": 2.0}, {"factor": 4.0}).plan().stages] == [True, False]


def test_end_to_end(tiny: Checkpoint, tmp_path: Path) -> None:
    """Prune, distil a few steps, export two ways: artifacts that load, generate and explain themselves."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"source: {tiny.folder}\n"
        "name: pruned\n"
        "context: 64\n"
        "calibration: {rows: 4, length: 32}\n"
        "evaluate: {tokens: 64}\n"
        "max_kl: 100\n"
        "passes:\n"
        "  - {kind: prune_depth, layers: 3, tokens: 64}\n"
        "  - {kind: distil, training: {steps: 2, batch: 2, precision: float32}}\n"
        "export:\n"
        "  - {format: gguf, type: Q8_0}\n"
        "  - {format: gguf, type: Q4_0, imatrix: true}\n"
    )
    result = alight.build(file, folder=tmp_path / "out")
    assert [a.name for a in result.artifacts] == ["pruned:q8_0", "pruned:q4_0-imatrix"]
    q8, q4 = result.candidates
    assert q8.quality.kl_mean and q4.quality.kl_mean, "measured against the source before pruning"
    assert q8.size > q4.size
    report = Store().get("pruned:q8_0").report
    assert report is not None
    assert [s["kind"] for s in report["stages"]] == ["prune_depth", "distil"]
    assert report["stages"][0]["parameters"] < tiny.parameters
    assert len(report["stages"][1]["measured"]["losses"]) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["pruned-q4_0-imatrix", "pruned-q8_0"]
    assert (tmp_path / "out/pruned-q8_0/report.html").is_file()
    with alight.load("pruned:q4_0-imatrix", context=64) as model:
        assert model.complete("The", max_tokens=4, ignore_eos=True).usage.completion_tokens == 4
    assert read(file).plan().stages[1].cached
