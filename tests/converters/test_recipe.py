"""Recipes: what is accepted, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_pass

from alight.errors import BadInput
from alight_converters import Recipe
from alight_converters.checkpoint import Checkpoint
from alight_converters.exports import names_of
from alight_converters.prune.depth import PruneDepth
from alight_converters.recipe_export import GGUF
from alight_converters.recipe_files import read

GOOD = """\
source: builtin:smollm2
name: small
for: raspberry-pi-5-8gb
calibration:
  rows: 8
passes:
  - kind: prune_depth
    layers: 28
  - kind: scale
    factor: 0.5
    log: runs.txt
    beside: x.txt
export:
  - {format: gguf, type: q4_k_m, imatrix: true}
  - {format: gguf, type: mixed, max_bytes: 90MB}
"""


@pytest.fixture(autouse=True)
def scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tiny_pass.register(tmp_path / "site")))


def written(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def test_a_whole_recipe(tmp_path: Path) -> None:
    recipe = read(written(tmp_path, GOOD))
    assert [p.kind for p in recipe.passes] == ["prune_depth", "scale"]
    assert isinstance(recipe.passes[0], PruneDepth)
    assert recipe.target == "raspberry-pi-5-8gb"
    assert [e.label for e in recipe.export] == ["Q4_K_M+imatrix", "mixed-90MB"]
    assert names_of(recipe.name, recipe.export) == ["small:q4_k_m-imatrix", "small:mixed-90mb"]
    assert recipe.passes[1].model_dump()["beside"] == tmp_path / "x.txt", "relative to the recipe"
    assert Recipe.parse(recipe.model_dump(mode="json", by_alias=True)) == recipe


def test_the_same_from_python() -> None:
    recipe = Recipe(source="x", name="y", passes=(PruneDepth(layers=3),), export=(GGUF(type="q8_0"),))
    assert names_of(recipe.name, recipe.export) == ["y:latest"]
    assert recipe.model_dump()["passes"][0]["layers"] == 3, "a pass is written with its own settings"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("factor: 0.5", "factor: 14", "recipe.yaml line 10: passes[1].factor: must be < 10, got 14"),
        ("factor: 0.5", "factr: 0.5", "line 10: passes[1].factr: unknown key; did you mean factor?"),
        ("factor: 0.5", "factor: 1\n    factor: 2", "line 11: passes[1].factor: is there twice, first in line 10"),
        ("    log: runs.txt\n", "", "line 9: passes[1].log: is missing"),
        ("kind: scale", "kind: prune_dept", "line 9: passes[1].kind: unknown kind 'prune_dept'; did you mean"),
        ("kind: scale", "layers: 2", "line 9: passes[1].kind: has no 'kind'; known: "),
        (GOOD[GOOD.index("  - kind: scale") : GOOD.index("export")], "  - scale\n", "line 9: passes[1]: must be a map"),
        ("type: q4_k_m", "type: q4_k", "line 14: export[0].type: unknown quantization type 'q4_k'"),
        ("type: q4_k_m", "type: f16", "line 14: export[0]: F16 has no use for an importance matrix"),
        (", max_bytes: 90MB", "", "line 15: export[1]: type mixed and max_bytes belong together"),
        ("90MB", "90 MBs", "line 15: export[1].max_bytes: '90 MBs' is not a size"),
        ("format: gguf, type: mixed", "format: gguff, type: mixed", "export[1].format: unknown format 'gguff'"),
        ("rows: 8", "text: 5", "line 5: calibration.text: must be a path, or hf://datasets/organisation/name, got 5"),
        ("rows: 8", "rows: 0", "line 5: calibration.rows: must be >= 1, got 0"),
        ("rows: 8", "row: 8", "line 5: calibration.row: unknown key; did you mean rows? known: length, rows, text"),
        ("name: small", "name: Not a name!", "line 2: name: 'Not a name!' is not a model name"),
        ("for: raspberry-pi-5-8gb", "device: tpu", "line 3: device: must be cpu, cuda or cuda:N, got 'tpu'"),
        ("source: builtin:smollm2\n", "", "line 1: source: is missing"),
        ("for: raspberry-pi-5-8gb", "contxt: 64", "line 3: contxt: unknown key; did you mean context?"),
        (GOOD[GOOD.index("export") :], "export: []\n", "line 13: export: must have one entry at least"),
        (GOOD, "- a list\n", "a recipe is a mapping"),
        (GOOD, "source: [unclosed\n", "line 2: not YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_line(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in GOOD
    with pytest.raises(BadInput) as caught:
        read(written(tmp_path, GOOD.replace(old, new)))
    assert told in caught.value.message


DISTIL = """\
source: builtin:smollm2
name: small
passes:
  - kind: distil
    method: {kind: logit, top_k: 8}
    lora:
      rank: 8
    training:
      steps: 3
export:
  - {format: gguf}
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("top_k: 8", "top_kk: 8", "line 5: passes[0].method.top_kk: unknown key; did you mean top_k? known: "),
        ("top_k: 8", "top_k: 0", "line 5: passes[0].method.top_k: must be >= 1, got 0"),
        ("top_k: 8", "divergence: kl", "line 5: passes[0].method.divergence: must be one of "
         "'forward_kl', 'reverse_kl' or 'jsd', got 'kl'"),
        ("kind: logit", "kind: logits", "line 5: passes[0].method.kind: must be one of 'logit', "
         "'feature', 'behaviour', 'on_policy', got 'logits'"),
        ("{kind: logit, top_k: 8}", "logits", "line 5: passes[0].method.kind: must be one of 'logit', 'feature', "),
        ("rank: 8", "rnk: 8", "line 7: passes[0].lora.rnk: unknown key; did you mean rank? known: alpha, rank"),
        ("rank: 8", "rank: many", "line 7: passes[0].lora.rank: input should be a valid integer"),
        ("steps: 3", "stepps: 3", "line 9: passes[0].training.stepps: unknown key; did you mean steps? known: "),
        ("steps: 3", "precision: fp8", "passes[0].training.precision: must be one of 'bf16' or 'float32', got 'fp8'"),
        ("\n      rank: 8", " 8", "line 6: passes[0].lora: must be a mapping; known: alpha, rank, got 8"),
        ("{format: gguf}", "{format: gguf, type: mixed}", "type mixed and max_bytes belong together, got {'format': "),
        ("{format: gguf}", "{format: gguf, type: iq1_s}", "IQ1_S needs an importance matrix: set imatrix: true"),
        ("{format: gguf}", "{format: gguf, type: bf16, imatrix: true}", "BF16 has no use for an importance matrix"),
    ],
)  # fmt: skip
def test_mistakes_inside_a_pass_name_the_key_the_value_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    assert old in DISTIL
    read(written(tmp_path, DISTIL))
    with pytest.raises(BadInput) as caught:
        read(written(tmp_path, DISTIL.replace(old, new)))
    assert told in caught.value.message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = (
        GOOD.replace("factor: 0.5", "factor: -1")
        .replace("rows: 8", "rows: 0")
        .replace("layers: 28", "layrs: 1")
    )
    with pytest.raises(BadInput) as caught:
        read(written(tmp_path, text))
    assert [line.split()[2].strip(":") for line in caught.value.message.splitlines()] == ["8", "10", "5"]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read the recipe"):
        read(tmp_path / "none.yaml")


def test_exports_need_different_names(tmp_path: Path, tiny: Checkpoint) -> None:
    recipe = Recipe(source=str(tiny.folder), name="x", export=(GGUF(type="Q8_0"), GGUF(type="Q8_0")))
    with pytest.raises(BadInput, match=r"two exports are named x:q8_0"):
        recipe.plan()


def test_files_that_are_not_there_are_told_at_once(tmp_path: Path, tiny: Checkpoint) -> None:
    recipe = read(written(tmp_path, GOOD))
    with pytest.raises(BadInput, match=r"passes\[1\]\.beside: .*x\.txt does not exist"):
        recipe.run()


def test_cuda_where_there_is_none(tiny: Checkpoint) -> None:
    recipe = Recipe(source=str(tiny.folder), name="x", export=(GGUF(type="Q8_0"),), device="cuda:7")
    with pytest.raises(BadInput, match=r"device: 'cuda:7', but torch .* sees \d+ CUDA devices"):
        recipe.run()
