"""Sparse pruning: Wanda and SparseGPT do what their papers say, on single matrices and on whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pruning
import pytest
import torch
from torch import Tensor

from alight.errors import BadInput, Unsupported
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.prune.solvers import sparsegpt, wanda
from alight_converters.prune.sparse import PruneSparse

Method = Literal["wanda", "sparsegpt"]


def correlated_inputs(tokens: int, width: int) -> Tensor:
    """Inputs of few directions and uneven sizes, in no order, as in real models."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(tokens, width // 4, generator=generator) @ torch.randn(
        width // 4, width, generator=generator
    )
    noise = 0.3 * torch.randn(tokens, width, generator=generator)
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    return (few / (width // 4) ** 0.5 + noise) * sizes


def random_weight(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


def magnitude(weight: Tensor, sparsity: float | None) -> Tensor:
    """The baseline of both papers: Wanda with inputs of one size."""
    return wanda(weight, torch.ones(weight.shape[1]), sparsity)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, None])
def test_sparsegpt_reconstructs_better_than_wanda_and_wanda_than_magnitude(sparsity: float | None) -> None:
    weight, inputs = random_weight(96, 320), correlated_inputs(2048, 320)  # two blocks and a half

    def error(pruned: Tensor) -> float:
        return float((inputs @ (pruned - weight).T).square().sum())

    best = error(sparsegpt(weight, inputs.T @ inputs, sparsity, 0.01))
    middle = error(wanda(weight, inputs.square().sum(0), sparsity))
    worst = error(magnitude(weight, sparsity))
    assert 1.3 * best < middle
    assert 2 * middle < worst


def test_wanda_drops_the_lowest_product_of_weight_and_input_in_each_row() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, -2.0, 1.0]])
    norms = torch.tensor([10.0, 1.0, 1.0, 1.0])
    found = wanda(weight, norms.square(), 0.5)
    assert found.tolist() == [[1, 0, 0, -4], [4, 3, 0, 0]]


def test_sparsegpt_is_exact_where_only_the_first_inputs_go() -> None:
    """Then all inputs that stay are to their right, and the errors that were spread over them make the least
    squares solution: W + W_dropped H_dk H_kk⁻¹."""
    inputs = correlated_inputs(1024, 40).double()
    hessian = inputs.T @ inputs
    weight = random_weight(6, 40).double()
    weight[:, :10] *= 1e-6
    found = sparsegpt(weight, hessian, 10 / 40, 1e-12)
    solution = hessian[:10, 10:] @ torch.linalg.inv(hessian[10:, 10:])
    assert (found[:, :10] == 0).all()
    torch.testing.assert_close(found[:, 10:], weight[:, 10:] + weight[:, :10] @ solution, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_an_input_that_is_always_zero_goes_first(sparsity: float) -> None:
    inputs = correlated_inputs(512, 64)
    inputs[:, 10] = 0
    pruned = sparsegpt(random_weight(32, 64), inputs.T @ inputs, sparsity, 0.01)
    assert (pruned[:, 10] == 0).all()
    assert torch.isfinite(pruned).all()


def test_a_hessian_without_an_inverse_is_refused() -> None:
    with pytest.raises(BadInput, match="64 inputs has no inverse with damping 1e-12"):
        sparsegpt(random_weight(8, 64), torch.ones(64, 64), 0.5, 1e-12)


def matrices(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in checkpoint.tensors() if "_proj.weight" in name}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", pruning.FAMILIES)
def test_two_of_every_four_inputs_are_zero_everywhere(family: str, method: Method, tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of(family, tmp_path / "model")
    context = pruning.context(tmp_path, checkpoint)
    made = PruneSparse(method=method, pattern="2:4").run(checkpoint, context)
    for name, tensor in made.tensors():
        if "_proj.weight" in name:
            assert ((tensor.reshape(-1, 4) == 0).sum(1) == 2).all(), name
        else:
            assert torch.equal(tensor, checkpoint.tensor(name)), name
    assert len(matrices(made)) == sum(map(len, context.measured["sparsity"]))
    assert all(share == 0.5 for layer in context.measured["sparsity"] for share in layer.values())
    assert torch.isfinite(pruning.logits(made)).all()


def test_wanda_takes_each_layers_inputs_from_the_pruned_layers_before_it(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("gemma2", tmp_path / "model")
    rows = pruning.random_rows()
    made = pruning.prune(PruneSparse(method="wanda", sparsity=0.5), checkpoint, tmp_path, rows)

    model = made.load()
    seen: list[Tensor] = []
    name = "model.layers.3.self_attn.k_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(input_ids=rows.rows)
    original = checkpoint.tensor(f"{name}.weight")
    scores = original.abs() * seen[0].flatten(0, 1).norm(dim=0)
    limit = scores.kthvalue(original.shape[1] // 2, dim=1, keepdim=True).values
    expected = torch.where(scores <= limit, 0, original)
    assert torch.equal(made.tensor(f"{name}.weight"), expected)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_target_counts_what_is_not_zero_in_the_whole_checkpoint(method: Method, tmp_path: Path) -> None:
    folder = pruning.tiny_checkpoints.save(
        tmp_path / "model", pruning.FAMILIES["llama"], dtype=torch.bfloat16
    )
    checkpoint = Checkpoint.open(folder)
    context = pruning.context(tmp_path, checkpoint)
    made = PruneSparse(method=method, ratio=0.8).run(checkpoint, context)
    left = sum(int(tensor.count_nonzero()) for _, tensor in made.tensors())
    assert 0.79 * checkpoint.parameters < left <= 0.8 * checkpoint.parameters
    assert context.measured["parameters"] == left
    assert made.tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16


def test_sparsegpt_loses_less_of_a_model_than_wanda(smollm2: Checkpoint, tmp_path: Path) -> None:
    rows = Calibration.of_text(pruning.english(), smollm2.tokenizer(), 12, 256)
    seen, unseen = Calibration(rows.rows[:-2], "docs"), rows.rows[-2:]
    lost = {}
    for method in ("wanda", "sparsegpt"):
        made = pruning.prune(PruneSparse(method=method, sparsity=0.5), smollm2, tmp_path, seen)
        lost[method] = pruning.kl(smollm2, made, unseen)
    assert lost["sparsegpt"] < lost["wanda"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1 is not between"),
        ({"ratio": 0.2}, "outside the layers' matrices"),
        ({"parameters": 10**9}, "a target of 1000000000 parameters"),
    ],
)
def test_a_target_that_cannot_be_reached_is_refused_with_the_numbers(
    target: dict[str, float], message: str, tmp_path: Path
) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model")
    with pytest.raises(BadInput, match=message):
        pruning.prune(PruneSparse(**target), checkpoint, tmp_path)


def test_the_pattern_needs_inputs_in_fours(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model", intermediate_size=162)
    with pytest.raises(Unsupported, match=r"down_proj.* 162 inputs are no multiple of 4"):
        pruning.prune(PruneSparse(pattern="2:4"), checkpoint, tmp_path)
