"""The importance matrix: right numbers under the right names, and the file that llama.cpp reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints
import torch
from transformers import Phi3Config

from alight.errors import BadInput, InvalidModelFile
from alight.gguf import read_header
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.quantize.imatrix import Imatrix, collect


def test_values_are_mean_squares_of_the_inputs(tiny: Checkpoint, random_rows: Calibration) -> None:
    matrix = collect(tiny, random_rows, batch=3)
    model = tiny.load()
    with torch.no_grad():
        embedded = model.model.embed_tokens(random_rows.rows)
        normed = model.model.layers[0].input_layernorm(embedded).flatten(0, 1)
        final = model.model(random_rows.rows).last_hidden_state.flatten(0, 1)
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        np.testing.assert_allclose(matrix.mean(name), normed.square().mean(0), rtol=1e-4)
    np.testing.assert_allclose(matrix.mean("output.weight"), final.square().mean(0), rtol=1e-4)
    assert matrix.mean("blk.3.ffn_down.weight").shape == (160,)
    assert len(matrix.sums) == 4 * 7 + 1
    assert (matrix.chunks, matrix.chunk_size, matrix.datasets) == (16, 32, ("random tokens",))


def test_a_tied_head_has_the_name_of_the_embedding(tmp_path: Path, random_rows: Calibration) -> None:
    config = tiny_checkpoints.llama_config(tie_word_embeddings=True)
    matrix = collect(Checkpoint.open(tiny_checkpoints.save(tmp_path / "tied", config)), random_rows)
    assert "token_embd.weight" in matrix.sums
    assert "output.weight" not in matrix.sums


def test_fused_matrices_have_one_entry(tmp_path: Path, random_rows: Calibration) -> None:
    sizes = tiny_checkpoints.llama_config(num_hidden_layers=1).to_dict()
    kept = {k: sizes[k] for k in sizes if k.startswith(("vocab", "hidden_size", "interm", "num_", "max_pos"))}
    config = Phi3Config(**kept, pad_token_id=0, tie_word_embeddings=False)
    matrix = collect(Checkpoint.open(tiny_checkpoints.save(tmp_path / "phi", config)), random_rows)
    layer = sorted(name for name in matrix.sums if name.startswith("blk.0."))
    assert layer == [f"blk.0.{part}.weight" for part in ("attn_output", "attn_qkv", "ffn_down", "ffn_up")]


def test_the_file_keeps_everything(tiny: Checkpoint, random_rows: Calibration, tmp_path: Path) -> None:
    made = collect(tiny, random_rows)
    read = Imatrix.load(made.save(tmp_path / "imatrix.gguf"))
    assert read.datasets == made.datasets
    assert (read.chunks, read.chunk_size) == (made.chunks, made.chunk_size)
    assert set(read.sums) == set(made.sums)
    for name in made.sums:
        np.testing.assert_array_equal(read.mean(name), made.mean(name))
    header = read_header(tmp_path / "imatrix.gguf")
    shapes = {t.name: t.shape for t in header.tensors}
    assert shapes["blk.0.ffn_down.weight.in_sum2"][0] == 160, "columns are innermost, as llama.cpp has them"
    assert list(tmp_path.glob(".*")) == []


def test_an_expert_without_tokens_counts_evenly() -> None:
    sums = np.array([[8.0, 2.0], [0.0, 0.0]], np.float32)
    matrix = Imatrix({"x": sums}, {"x": np.array([2, 0], np.float32)})
    assert matrix.mean("x").tolist() == [4.0, 1.0, 1.0, 1.0]


def test_what_is_no_importance_matrix(
    tiny: Checkpoint, random_rows: Calibration, tmp_path: Path, smollm2_file: Path
) -> None:
    with pytest.raises(BadInput, match="no importance matrix at"):
        Imatrix.load(tmp_path / "absent.gguf")
    with pytest.raises(InvalidModelFile, match="not an importance matrix"):
        Imatrix.load(smollm2_file)
    whole = collect(tiny, random_rows).save(tmp_path / "imatrix.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidModelFile, match="truncated"):
        Imatrix.load(cut)
    negative = Imatrix({"x": np.array([[-1.0]], np.float32)}, {"x": np.ones(1, np.float32)})
    with pytest.raises(InvalidModelFile, match="negative"):
        Imatrix.load(negative.save(tmp_path / "negative.gguf"))


def test_activations_that_overflow_are_told(
    tiny: Checkpoint, random_rows: Calibration, tmp_path: Path
) -> None:
    def huge() -> list[tuple[str, torch.Tensor]]:
        return [(n, t * 1e30 if "layers.1.mlp.up_proj" in n else t) for n, t in tiny.tensors()]

    broken = tiny.with_tensors(huge(), tmp_path / "broken")
    with pytest.raises(InvalidModelFile, match=r"inputs of blk\.\d\.\w+\.weight are not finite"):
        collect(broken, random_rows)
