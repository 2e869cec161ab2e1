"""Exactly what was asked for: several formats and types from one source, in one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alight import api
from alight.builder import BuildRequest
from alight.cli import application
from alight.errors import BadInput
from alight.store import Store
from alight_converters.build_exports import ExportsBuilder, exports_of
from alight_converters.checkpoint import Checkpoint

QUICK: dict[str, Any] = {"tokens": 64, "context": 64}


def request(checkpoint: Checkpoint, **changes: Any) -> BuildRequest:
    return api.prepare_build(
        checkpoint.folder, device="raspberry-pi-5-8gb", name="made", format="gguf", **(QUICK | changes)
    )[1]


def test_several_types_are_artifacts_of_one_lineage(tiny: Checkpoint, tmp_path: Path) -> None:
    wanted = request(tiny, types=("q8_0", "q4_0"), folder=tmp_path / "out")
    result = ExportsBuilder().build(wanted)
    assert [a.name for a in result.artifacts] == ["made:q8_0", "made:q4_0"]
    assert len({a.lineage for a in result.artifacts}) == 1
    q8, q4 = result.candidates
    assert q8.quality.kl_mean and q4.quality.kl_mean
    assert q8.quality.kl_mean < q4.quality.kl_mean
    for artifact in result.artifacts:
        report = Store().get(artifact.name).report
        assert report is not None
        assert [c["quantization"] for c in report["candidates"]] == ["Q8_0", "Q4_0"]
        assert report["chosen"] == artifact.description.quantization
        assert (tmp_path / "out" / artifact.name.replace(":", "-") / "model.gguf").is_file()


def test_a_format_takes_its_own_types(tiny: Checkpoint) -> None:
    wanted = request(tiny)
    assert [e.label for e in exports_of(wanted)] == ["Q4_K_M"]
    both = BuildRequest(**{**fields_of(wanted), "types": ("q4_0+imatrix",)})
    assert [e.label for e in exports_of(both)] == ["Q4_0+imatrix"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "ggfu"], "unknown format 'ggfu'\nDid you mean gguf?"),
        (["--format", "gguf", "--quant", "int3"], "unknown quantization type 'int3'"),
        (
            ["--format", "mlc", "--quant", "int4"],
            "no mlc type is 'int4'\nmlc: MLC mode 'int4' is not known. Use one of q0f16",
        ),
        (
            ["--format", "onnx", "--quant", "q4_0"],
            "no onnx type is 'q4_0'\nonnx: unknown ONNX type 'q4_0'. Known: fp32",
        ),
        (["--format", "onnx,mlc", "--quant", "int4", "--quant", "q4_0"], "no onnx and no mlc type is 'q4_0'"),
        (["--format", "gguf,"], "unknown format ''"),
    ],
)
def test_a_wrong_combination_is_told(tiny: Checkpoint, options: list[str], words: str) -> None:
    done = CliRunner().invoke(application(), ["build", str(tiny.folder), *options])
    assert isinstance(done.exception, BadInput)
    assert words in str(done.exception)


def test_a_calibration_text_that_nothing_uses_is_told(tiny: Checkpoint) -> None:
    with pytest.raises(BadInput, match="Q8_0 needs none"):
        exports_of(BuildRequest(**{**fields_of(request(tiny)), "types": ("q8_0",), "calibration": "x"}))


def test_a_folder_that_exists_is_told_before_any_work(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exists already"):
        ExportsBuilder().build(request(tiny, folder=tmp_path))
    assert Store().names() == []


def fields_of(wanted: BuildRequest) -> dict[str, Any]:
    return {name: getattr(wanted, name) for name in BuildRequest.__dataclass_fields__}
