"""The build verb: one form, a dry run, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import TEXT
from typer.testing import CliRunner

from alight.cli import application
from alight.errors import BadInput
from alight.store import Store
from alight_converters.checkpoint import Checkpoint


def alight(*words: object) -> Any:
    return CliRunner().invoke(application(), ["build", *map(str, words)])


@pytest.fixture
def recipe(tmp_path: Path, tiny: Checkpoint) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(
        f"source: {tiny.folder}\n"
        "name: small\n"
        "context: 64\n"
        "calibration: {rows: 2, length: 16}\n"
        "evaluate: {tokens: 64}\n"
        "passes: [{kind: prune_depth, layers: 3, tokens: 16}]\n"
        "export: [{format: gguf, type: q8_0}]\n"
    )
    return file


def test_one_form(tiny: Checkpoint) -> None:
    done = alight(tiny.folder, "--quant", "q8_0", "-o", "one", "--tokens", 64, "--context", 64, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["chosen"] == "Q8_0"
    assert told["front"] == ["Q8_0"]
    assert [c["quantization"] for c in told["candidates"]] == ["Q8_0"]
    assert told["candidates"][0]["memory_bytes"] > 0, "measured, since the device is this machine"


def test_a_dry_run_of_a_search(tiny: Checkpoint) -> None:
    done = alight(tiny.folder, "--for", "raspberry-pi-5-8gb", "--streams", 4, "--context", 512, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "Q4_0+imatrix" in done.stdout
    assert "4 streams of 512" in done.stdout


def test_several_streams_and_calibration_from_a_file(tiny: Checkpoint, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": line}) for line in TEXT.read_text().splitlines() if line))
    asked = ("--quant", "q4_0+imatrix", "--tokens", 64, "--context", 32, "-o", "one")
    done = alight(tiny.folder, *asked, "--streams", 2, "--calibration", rows)
    assert done.exit_code == 0, done.output
    report = Store().get("one").report
    assert report is not None
    assert report["settings"]["calibration"].startswith("rows.jsonl, ")
    (measured,) = report["candidates"]
    assert f"{measured['stream_speed']:.1f}" in done.stdout
    assert "TOK/S is that of each of 2 streams" in done.stdout


@pytest.mark.parametrize("format", ["gguf", "gguf,mlc"])
def test_a_dry_run_misses_the_calibration_text(tiny: Checkpoint, tmp_path: Path, format: str) -> None:
    asked = ("--quant", "q4_0+imatrix", "--context", 64, "--format", format, "--dry-run", "--calibration")
    refused = alight(tiny.folder, *asked, tmp_path / "absent.txt")
    assert "absent.txt does not exist" in str(refused.exception)
    assert "is no address of a data set" in str(alight(tiny.folder, *asked, "hf://org/name").exception)


def test_a_recipe_and_its_dry_run(recipe: Path) -> None:
    before = alight(recipe, "--dry-run")
    assert before.exit_code == 0, before.output
    assert "1. prune_depth" in before.stdout
    assert "about" in before.stdout
    assert "Q8_0" in before.stdout
    done = alight(recipe, "--for", "raspberry-pi-5-8gb", "-o", "other", "--json")
    assert done.exit_code == 0, done.output
    assert [a["name"] for a in json.loads(done.stdout)["artifacts"]] == ["other"]
    assert "done before" in alight(recipe, "--dry-run").stdout


def test_options_of_a_search_beside_a_recipe(recipe: Path) -> None:
    refused = alight(recipe, "--max-kl", "1", "--context", "64")
    assert isinstance(refused.exception, BadInput)
    assert "--max-kl, --context is given beside a recipe" in refused.exception.message


def test_a_limit_that_nothing_meets(tiny: Checkpoint) -> None:
    refused = alight(tiny.folder, "--max-memory", "1MB", "--context", 64)
    assert "--max-memory is the limit that binds, by" in str(refused.exception)
