"""Quantized decoders: the integers are those that were meant, and the runtime reads them as such."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import tiny_checkpoints
import torch
from gguf_scores import kl, reference
from onnx_scores import log_probabilities

from alight.errors import BadInput
from alight_converters.build_weights import Weights
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.export import onnx
from alight_converters.export.onnx import Precision
from alight_converters.export.onnx_rounding import Grid, by_importance, to_nearest
from alight_converters.onnx_export import ONNX
from alight_converters.qat import grids
from alight_converters.quantize.imatrix import collect
from alight_converters.recipe_export import ExportContext

Graphs = dict[str, tuple[Checkpoint, Path]]

TOKENS = [int(t) for t in np.random.default_rng(0).integers(2, 500, 48)]


def random_matrix(rows: int = 40, columns: int = 192) -> np.ndarray:
    generator = np.random.default_rng(1)
    found = generator.normal(size=(rows, columns)) * generator.lognormal(sigma=2, size=(rows, 1))
    found[3, :64] = 0
    found[4, :32] = 1e-39  # so small that float32 has no inverse of the scale
    return found.astype(np.float32)


@pytest.mark.parametrize(("bits", "grid"), [(4, grids.onnx_int4), (8, grids.onnx_int8)])
def test_rounding_to_the_nearest_is_the_grid_of_training_bit_for_bit(bits: int, grid: grids.Rounding) -> None:
    matrix = random_matrix()
    matrix[5] = np.arange(-96, 96) / 16  # halves, which round away from zero
    rounded = to_nearest(matrix, Grid(bits, 32, symmetric=True))
    assert (rounded.weights() == grid(torch.from_numpy(matrix)).numpy()).all()


@pytest.mark.parametrize("block", [32, 64])
def test_zero_points_keep_a_block_of_one_sign_finer(block: int) -> None:
    matrix = np.abs(random_matrix())
    errors = [
        np.abs(to_nearest(matrix, Grid(4, block, symmetric)).weights() - matrix).sum()
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_loses_less_where_it_matters(symmetric: bool) -> None:
    matrix, grid = random_matrix(), Grid(4, 32, symmetric)
    importance = np.random.default_rng(2).lognormal(sigma=1.5, size=matrix.shape[1]).astype(np.float32)

    def loss(weights: np.ndarray) -> np.ndarray:
        return (importance * np.square(weights - matrix)).sum(-1) / (importance * np.square(matrix)).sum(-1)

    searched, nearest = by_importance(matrix, grid, importance), to_nearest(matrix, grid)
    assert searched.scales.dtype == np.float16
    assert np.mean(loss(searched.weights()) / loss(nearest.weights())) < 0.85
    assert (searched.weights()[3, :64] == 0).all()

    importance[32:64] = 0  # as of inputs that the calibration text never used
    unseen = slice(32, 64)
    error = np.square(by_importance(matrix, grid, importance).weights() - matrix)[6:, unseen].sum()
    assert error < 0.02 * np.square(matrix[6:, unseen]).sum()


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Checkpoints and their float graphs, from one start of the builder."""
    folder = tmp_path_factory.mktemp("graphs")
    changes: dict[str, dict[str, object]] = {
        "tied": {"tie_word_embeddings": True},
        "untied": {},
        "odd": {"tie_word_embeddings": True, "intermediate_size": 88},
        "wide": {"tie_word_embeddings": True, "vocab_size": 8000},
    }
    made = {}
    for name, changed in changes.items():
        path = tiny_checkpoints.save(folder / name, tiny_checkpoints.llama_config(**changed))
        made[name] = (Checkpoint.open(path), folder / f"{name}-onnx")
    onnx.build(list(made.values()), "fp32")
    return made


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize(
    "precision", [Precision("int8"), Precision("int4"), Precision("int4", 64, symmetric=False)]
)
def test_what_the_runtime_computes_is_the_model_of_the_rounded_weights(
    graphs: Graphs, name: str, precision: Precision, tmp_path: Path
) -> None:
    """With activations that are rounded to 8 bits: so nearly, not exactly."""
    checkpoint, graph = graphs[name]
    (tmp_path / "onnx").mkdir()
    assert onnx.quantize(graph, tmp_path / "onnx", precision) == []
    weights = ((n, torch.from_numpy(w)) for n, w in _rounded(checkpoint, precision))
    rounded = checkpoint.with_tensors(weights, tmp_path / "rounded")
    got = log_probabilities(tmp_path / "onnx", TOKENS, steps=4)[:-1]
    assert kl(reference(rounded, TOKENS), got) < 0.002
    assert kl(reference(checkpoint, TOKENS), got) < {"int8": 0.005, "int4": 0.3}[precision.type]


def _rounded(checkpoint: Checkpoint, precision: Precision) -> list[tuple[str, np.ndarray]]:
    tied = checkpoint.config["tie_word_embeddings"]
    bits = 4 if precision.type == "int4" else 8
    made = []
    for name, tensor in checkpoint.tensors():
        weights = tensor.numpy()
        if weights.ndim == 2:
            is_head = name == "lm_head.weight" or (tied and "embed" in name)
            block = next(b for b in (precision.block, 32) if weights.shape[1] % b == 0)
            symmetric = precision.symmetric or is_head or "embed" in name
            weights = to_nearest(weights, Grid(8 if is_head else bits, block, symmetric)).weights()
        made.append((name, weights))
    return made


def test_trained_weights_reach_the_file_bit_for_bit(tmp_path: Path) -> None:
    """As QAT leaves them: linear layers on the grid of 4 bits, the tied head on that of 8."""
    config = tiny_checkpoints.llama_config(tie_word_embeddings=True)
    start = Checkpoint.open(tiny_checkpoints.save(tmp_path / "start", config))
    grid = grids.GRIDS["onnx_int4"]
    trained = {
        name: t if t.dim() == 1 else grid.head(t) if "embed" in name else grid.linear(t)
        for name, t in start.tensors()
    }
    checkpoint = start.with_tensors(trained.items(), tmp_path / "trained")
    onnx.export(checkpoint, tmp_path / "onnx", Precision("int4"))
    held = onnx_ir.load(tmp_path / "onnx/model.onnx").graph.initializers

    def weights(name: str, bits: int) -> np.ndarray:
        integers = held[f"{name}.integers"].const_value.numpy()
        if bits == 4:
            integers = np.stack([integers & 15, integers >> 4], -1).reshape(*integers.shape[:2], -1)
        scaled = (integers.astype(np.float32) - 2 ** (bits - 1)) * held[f"{name}.scales"].const_value.numpy()[
            ..., None
        ]
        return scaled.reshape(len(scaled), -1)

    layer = "model.layers.2"
    qkv = torch.cat([trained[f"{layer}.self_attn.{p}_proj.weight"] for p in "qkv"]).numpy()
    assert (weights(f"{layer}.attn.qkv_proj", 4) == qkv).all()
    assert (weights(f"{layer}.mlp.down_proj", 4) == trained[f"{layer}.mlp.down_proj.weight"].numpy()).all()
    assert (weights("lm_head", 8) == trained["model.embed_tokens.weight"].numpy()).all()


def test_rows_that_no_block_divides_stay_in_float(graphs: Graphs, tmp_path: Path) -> None:
    checkpoint, graph = graphs["odd"]
    kept = onnx.quantize(graph, tmp_path, Precision("int8"))
    assert kept == [f"/model/layers.{n}/mlp/down_proj/MatMul" for n in range(4)]
    assert kl(reference(checkpoint, TOKENS), log_probabilities(tmp_path, TOKENS)[:-1]) < 0.005


def test_tied_weights_are_in_the_file_once(graphs: Graphs, tmp_path: Path) -> None:
    checkpoint, graph = graphs["wide"]
    onnx.quantize(graph, tmp_path, Precision("int4"))
    table, scales = 8000 * 64, 8000 * 2 * 4
    rest = (checkpoint.parameters - table) * 5 // 8 + 2 * 256 * 8 * 4  # and the tables of the rope
    assert (tmp_path / "model.onnx.data").stat().st_size < 1.1 * (table + scales + rest)


def test_an_export_of_a_recipe_is_calibrated_by_the_recipes_rows(
    tiny: Checkpoint, random_rows: Calibration, tmp_path: Path
) -> None:
    export = ONNX.of_type("int4-b64-asym+imatrix")
    assert (export.label, export.calibrated) == ("int4-b64-asym+imatrix", True)
    (tmp_path / "out").mkdir()
    context = ExportContext(tmp_path / "out", Weights(tiny, tmp_path), lambda: random_rows)
    folder = export.run(context)
    assert folder.name == export.label
    assert {
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= {f.name for f in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["onnx_precision"] == "int4-b64-asym"
    assert kl(reference(tiny, TOKENS), log_probabilities(folder, TOKENS)[:-1]) < 0.3


def test_unknown_types_are_refused() -> None:
    assert ONNX.of_type(None) == ONNX()
    with pytest.raises(BadInput, match="int3"):
        ONNX.of_type("int3")
    with pytest.raises(ValueError, match="importance"):
        ONNX(type="int8", imatrix=True)


def test_an_importance_matrix_of_another_model_is_refused(
    graphs: Graphs, random_rows: Calibration, tmp_path: Path
) -> None:
    other = tiny_checkpoints.save(tmp_path / "other", tiny_checkpoints.llama_config(hidden_size=128))
    theirs = collect(Checkpoint.open(other), random_rows)
    with pytest.raises(BadInput, match="another model"):
        onnx.quantize(graphs["tied"][1], tmp_path, Precision("int4"), imatrix=theirs)
