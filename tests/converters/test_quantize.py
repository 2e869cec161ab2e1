"""llama.cpp's quantizer with importance matrices and types per tensor, on real weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import alight
from alight import evaluate
from alight.errors import BadInput
from alight.gguf import read_header
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.gguf import export
from alight_converters.quantize.gguf import Plan, plan, quantize
from alight_converters.quantize.imatrix import Imatrix, collect

TEXT = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def source(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(smollm2_file, tmp_path_factory.mktemp("float") / "F32.gguf", "F32")


@pytest.fixture(scope="module")
def matrix(smollm2: Checkpoint) -> Imatrix:
    import torch

    text = "\n".join(file.read_text() for file in sorted(TEXT.glob("*.md")))
    ids = torch.tensor(smollm2.tokenizer()(text[2000:])["input_ids"][: 8 * 256])
    return collect(smollm2, Calibration(ids.reshape(8, 256), "alight's documentation"), batch=2)


def types(file: Path) -> dict[str, str]:
    return {t.name: t.type for t in read_header(file).tensors}


def test_an_imatrix_lowers_the_loss(source: Path, matrix: Imatrix, tmp_path: Path) -> None:
    plain = quantize(source, tmp_path / "plain.gguf", "Q4_0")
    # By file and in memory are the same; only ffn_down of the first layers then differs in type.
    saved = matrix.save(tmp_path / "imatrix.gguf")
    better = quantize(source, tmp_path / "better.gguf", "Q4_0", imatrix=saved)
    again = quantize(source, tmp_path / "again.gguf", "Q4_0", imatrix=matrix)
    assert better.read_bytes() == again.read_bytes()
    text = "The cat sat by the window and watched the rain. " * 3 + (TEXT / "engine.md").read_text()[:2000]
    with alight.load(str(source), context=512) as model:
        reference = evaluate.Reference.of(model, evaluate.windows_of(model, text, 512))
    losses = []
    for file in (plain, better):
        with alight.load(str(file), context=512) as model:
            losses.append(evaluate.compare(model, reference).kl_mean)
    assert losses[1] is not None and losses[0] is not None
    assert losses[1] < 0.9 * losses[0], losses


def test_two_bits_need_an_imatrix(source: Path, matrix: Imatrix, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(BadInput, match=r"IQ2_XS needs an importance matrix for blk\.\d+\.ffn_down\.weight"):
        quantize(source, out, "iq2_xs")
    with pytest.raises(BadInput, match="IQ2_XS needs an importance matrix"):
        plan(source, "IQ2_XS")
    assert list(tmp_path.iterdir()) == []
    one = {"blk.20.ffn_down.weight": "IQ2_XS"}  # one tensor, since these types take long
    quantize(source, out, "q8_0", imatrix=matrix, tensor_types=one)
    assert types(out)["blk.20.ffn_down.weight"] == "IQ2_XS"


def test_types_per_tensor(source: Path, tmp_path: Path) -> None:
    wanted = {"blk.1.attn_q.weight": "q8_0", "token_embd.weight": "Q5_1", "blk.2.ffn_down.weight": "Q3_K"}
    made = types(quantize(source, tmp_path / "out.gguf", "Q4_0", tensor_types=wanted))
    assert made["blk.1.attn_q.weight"] == "Q8_0"
    assert made["blk.11.attn_q.weight"] == "Q4_0", "names are whole, not prefixes"
    assert made["token_embd.weight"] == "Q5_1"
    assert made["blk.2.ffn_down.weight"] == "Q3_K"


def test_a_split_source_becomes_one_file(tiny: Checkpoint, random_rows: Calibration, tmp_path: Path) -> None:
    parts = export(tiny, tmp_path / "parts.gguf", "F32", shard=300_000)
    assert len(parts) > 1
    matrix = collect(tiny, random_rows)
    made = quantize(
        parts[0], tmp_path / "q.gguf", "Q8_0", imatrix=matrix, tensor_types={"blk.3.ffn_up.weight": "Q5_0"}
    )
    assert types(made)["blk.0.attn_q.weight"] == "Q8_0"
    assert types(made)["blk.3.ffn_up.weight"] == "Q5_0"
    assert plan(parts[0], "Q8_0").bytes == read_header(quantize(parts[0], made, "Q8_0")).weight_bytes


def test_the_plan_is_what_gets_written(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planned = plan(source, "Q3_K_M")
    with caplog.at_level(logging.WARNING):
        header = read_header(quantize(source, tmp_path / "out.gguf", "Q3_K_M"))
    assert planned.types == {t.name: t.type for t in header.tensors}
    assert planned.bytes == header.weight_bytes
    assert planned.fallbacks["blk.4.attn_q.weight"] == ("Q3_K", "Q4_0"), "576 is no multiple of 256"
    assert "blk.4.ffn_down.weight" not in planned.fallbacks
    assert "are Q4_0, not Q3_K" in caplog.text
    assert isinstance(planned, Plan)


def test_wrong_arguments(source: Path, matrix: Imatrix, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(BadInput, match=r"(?s)unknown quantization type 'Q4_K_X'.*Q4_K_[MS]"):
        quantize(source, out, "Q4_K_X")
    with pytest.raises(BadInput, match=r"(?s)unknown tensor type 'Q4_K_M'.*Q4_K"):
        quantize(source, out, "Q4_0", tensor_types={"blk.1.attn_q.weight": "Q4_K_M"})
    with pytest.raises(BadInput, match=r"(?s)no tensor 'blk.1.attn_q'.*blk.1.attn_q.weight"):
        quantize(source, out, "Q4_0", tensor_types={"blk.1.attn_q": "Q4_0"})
    with pytest.raises(BadInput, match="no effect in a F16 file"):
        quantize(source, out, "F16", tensor_types={"blk.1.attn_q.weight": "Q4_0"})
    with pytest.raises(BadInput, match="no file"):
        quantize(tmp_path / "absent.gguf", out, "Q4_0")
    assert list(tmp_path.iterdir()) == []


def test_an_imatrix_of_another_model(source: Path, matrix: Imatrix, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    deeper = {**matrix.sums, "blk.30.attn_q.weight": np.ones((1, 576), np.float32)}
    counts = {name: np.ones(1, np.float32) for name in deeper}
    with pytest.raises(BadInput, match=r"another model: it has blk\.30\.attn_q\.weight"):
        quantize(source, out, "Q4_0", imatrix=replace(matrix, sums=deeper, counts=counts))
    shallower = {n: v for n, v in matrix.sums.items() if not n.startswith(("blk.28.", "blk.29."))}
    with pytest.raises(BadInput, match=r"lacks layer 28 and 1 more"):
        quantize(source, out, "Q4_0", imatrix=replace(matrix, sums=shallower))
    wider = matrix.sums | {"blk.0.attn_q.weight": np.ones((1, 960), np.float32)}
    with pytest.raises(BadInput, match=r"blk\.0\.attn_q\.weight has 576 columns, the matrix 960"):
        quantize(source, out, "Q4_0", imatrix=replace(matrix, sums=wider))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alight_converters.quantize import gguf

    real = gguf.subprocess.run

    def interrupted(*args: object, **options: object) -> None:
        real(*args, **options)  # type: ignore[call-overload]
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.subprocess, "run", interrupted)
    (tmp_path / "out.gguf").write_bytes(b"what was there")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out.gguf", "Q4_0")
    assert (tmp_path / "out.gguf").read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
