"""What a build takes: GGUFs in parts, calibration files, every type of llama.cpp's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints
from numpy.typing import NDArray

import alight
from alight.artifact import Artifact
from alight.errors import BadInput, InvalidModelFile
from alight.gguf import read_header, read_headers
from alight_converters import Recipe
from alight_converters.build_weights import LENGTH, MOST_ROWS
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.gguf import export
from alight_converters.quantize.gguf import merge

SMALL = {"tokens": 64, "context": 64}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.fixture
def parts(tiny: Checkpoint, tmp_path: Path) -> list[Path]:
    found = export(tiny, tmp_path / "parts.gguf", "F32", shard=300_000)
    assert len(found) > 2
    return found


def test_parts_are_one_model(tiny: Checkpoint, parts: list[Path], tmp_path: Path) -> None:
    loose = Artifact.loose(parts[1])
    assert (loose.name, loose.weights) == ("parts", parts)
    assert loose.description.parameters == tiny.parameters
    (whole,) = export(tiny, tmp_path / "whole.gguf", "F32", shard=0)
    merged = merge(parts[0], tmp_path / "merged.gguf")
    assert {t.name: (t.shape, t.type) for t in read_header(merged).tensors} == {
        t.name: (t.shape, t.type) for t in read_headers(parts).tensors
    }
    first, *others = (scores(file) for file in (whole, merged, parts[0]))
    assert all((first == other).all() for other in others), "bit for bit"

    odd = whole.rename(tmp_path / "odd-00003-of-00002.gguf")
    assert Artifact.loose(odd).weights == [odd], "named like a part, but it can be none"


def scores(file: Path) -> NDArray[np.float32]:
    with alight.load(str(file), context=64) as model:
        return model.score(model.tokenize("A walk in the park", bos=True)).logprobs


def test_a_split_gguf_is_built_from(tiny: Checkpoint, parts: list[Path]) -> None:
    made = alight.build(parts[0], name="loose", types=("Q8_0",), **SMALL)
    assert made.artifact.description.parameters == tiny.parameters
    alight.pull(str(parts[0]), name="pulled")
    again = alight.build("pulled", name="stored", types=("Q8_0", "Q4_0+imatrix"), **SMALL)
    assert again.candidates[0].quality == made.candidates[0].quality
    assert again.artifact.lineage == made.artifact.lineage


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(InvalidModelFile, match=rf"one of {len(parts)} parts, .* first {parts[1].name}"):
        alight.build(parts[0], types=("Q8_0",), **SMALL)


@pytest.fixture
def chats(tmp_path: Path, tiny: Checkpoint) -> Path:
    (tiny.folder / "chat_template.jinja").write_text(TEMPLATE)
    lines = [x for x in tiny_checkpoints.TEXT.read_text().splitlines() if x] * 8
    file = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": x}]}
        for x in lines
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_calibration_chats_go_through_the_template_and_are_all_used(tiny: Checkpoint, chats: Path) -> None:
    rows = Calibration.of_file(chats, tiny.tokenizer(), MOST_ROWS, LENGTH, fewest=1)
    assert rows.tokens > 8192
    made = alight.build(
        tiny.folder, name="one", types=("Q8_0", "Q4_0+imatrix"), calibration=chats, max_kl=1e-12, **SMALL
    )
    assert made.chosen.quantization == "Q8_0"
    report = made.artifact.report
    assert report is not None
    assert report["settings"]["calibration"] == f"chats.jsonl, {rows.tokens:,} tokens"

    again = alight.build(
        tiny.folder, name="two", types=("Q8_0", "Q4_0+imatrix"), calibration=chats, max_kl=1e-12, **SMALL
    )
    assert again.artifact.report is not None
    assert again.artifact.report["settings"] == report["settings"], "told where nothing is made anew, too"

    chats.write_text(chats.read_text().replace("Tell me.", "Tell me more."))
    other = alight.build(tiny.folder, name="three", types=("Q4_0+imatrix",), calibration=chats, **SMALL)
    assert other.candidates[0].quality != made.candidates[1].quality, "another file is another matrix"
    with pytest.raises(BadInput, match=r"absent\.jsonl does not exist"):
        alight.build(
            tiny.folder, types=("Q4_0+imatrix",), calibration=chats.with_name("absent.jsonl"), **SMALL
        )


def test_types_that_do_not_fit_are_in_the_report(tiny: Checkpoint) -> None:
    made = alight.build(tiny.folder, name="one", types=("iq4_xs",), **SMALL)
    report = made.artifact.report
    assert report is not None
    told = {f["tensor"]: (f["wanted"], f["taken"]) for f in report["fallbacks"]}
    assert told["blk.0.attn_q.weight"] == ("IQ4_XS", "IQ4_NL"), "64 columns are no multiple of 256"
    assert "are IQ4_NL, not IQ4_XS" in made.artifact.files["report.html"].read_text()
    recipe = {"source": str(tiny.folder), "name": "two", "evaluate": {"tokens": 64}, "context": 64}
    by_recipe = Recipe.parse(recipe | {"export": [{"format": "gguf", "type": "iq4_xs"}]}).run()
    assert by_recipe.artifact.report is not None
    assert by_recipe.artifact.report["fallbacks"] == report["fallbacks"]


def test_what_needs_a_matrix_is_refused_before_any_work(tiny: Checkpoint) -> None:
    with pytest.raises(BadInput, match="IQ1_S needs an importance matrix") as caught:
        alight.build(tiny.folder, types=("iq1_s",), **SMALL)
    assert "iq1_s+imatrix" in caught.value.hint


def test_time_on_a_gpu_is_estimated_from_what_was_measured_on_one(tiny: Checkpoint) -> None:
    def stage(kind: str, steps: int):  # type: ignore[no-untyped-def]
        training = {"steps": steps, "batch": 16}
        data = {
            "source": str(tiny.folder), "name": "x", "device": "cuda", "calibration": {"rows": 4, "length": 64},
            "passes": [{"kind": kind, "training": training}], "export": [{"format": "gguf"}],
        }  # fmt: skip
        return Recipe.parse(data).plan().stages[0]

    for kind, speed in (("distil", 91_000), ("qat", 73_600)):
        short, long = stage(kind, 1_000), stage(kind, 3_000)
        expected = 2_000 * 16 * 64 / speed * tiny.parameters / 135e6
        assert long.seconds - short.seconds == pytest.approx(expected)
        assert long.machine == "one H100"
