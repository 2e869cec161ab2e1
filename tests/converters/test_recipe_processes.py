"""A recipe under torchrun: the processes train together, and the first one does everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pass

from alight_converters.checkpoint import Checkpoint
from alight_converters.recipe_files import read

# Runs a recipe in one of several processes and writes down what it gave.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from alight.errors import AlightError
from alight_converters.recipe_files import read

torch.set_num_threads(1)
told = Path(sys.argv[2] + os.environ["RANK"])
try:
    result = read(Path(sys.argv[1])).run()
    losses = result.artifact.report["stages"][1]["measured"]["losses"]
    told.write_text(json.dumps([result.artifact.digest, losses]))
except AlightError as error:
    told.write_text(json.dumps(str(error)))
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pass for one process, and one for all."""
    monkeypatch.syspath_prepend(str(tiny_pass.register(tmp_path / "site")))
    (tmp_path / "script.py").write_text(SCRIPT)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"source: {tiny.folder}\n"
        "name: together\n"
        "context: 64\n"
        "calibration: {rows: 4, length: 16}\n"
        "evaluate: {tokens: 64}\n"
        "passes:\n"
        f"  - {{kind: scale, factor: 2, log: {tmp_path / 'runs.txt'}}}\n"
        "  - {kind: distil, training: {steps: 2, batch: 2, precision: float32}}\n"
        "export: [{format: gguf, type: Q8_0}]\n"
    )
    return file


def torchrun(recipe: Path, *command: object) -> str:
    """What two processes print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(recipe.parent / "site")}
    words = [*launcher, *map(str, command)]
    done = subprocess.run(words, check=True, env=environment, timeout=240, stdout=subprocess.PIPE, text=True)
    return done.stdout


def told(recipe: Path, name: str) -> list[object]:
    """What each of two processes gave."""
    folder = recipe.parent
    torchrun(recipe, folder / "script.py", recipe, folder / name)
    return [json.loads((folder / f"{name}{rank}").read_text()) for rank in (0, 1)]


def test_two_processes_run_a_recipe_together(recipe: Path) -> None:
    first, second = told(recipe, "result")
    assert first == second
    assert (recipe.parent / "runs.txt").read_text() == "scale 2\n", "in one process"
    assert [s.cached for s in read(recipe).plan().stages] == [True, True]
    printed = torchrun(recipe, "-m", "alight", "build", recipe, "--json")
    assert json.loads(printed)["artifact"]["name"] == "together", "one result, not two"


def test_all_processes_tell_the_error_of_the_first(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("factor: 2,", "factor: 2, refuses: true,"))
    assert told(recipe, "error") == ["passes[0] (scale): the factor is refused\nGive another."] * 2
