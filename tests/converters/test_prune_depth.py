"""Depth pruning: the right layers go, and what is left is a model that transformers loads."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pruning
import pytest
import torch
from pydantic import ValidationError

from alight.errors import BadInput
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.prune.blocks import Blocks
from alight_converters.prune.depth import PruneDepth, without_layers


@pytest.mark.parametrize("family", pruning.FAMILIES)
def test_influence_is_one_minus_the_cosine_of_input_and_output(family: str, tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of(family, tmp_path / "model")
    context = pruning.context(tmp_path, checkpoint)
    made = PruneDepth(layers=3, method="influence").run(checkpoint, context)

    model = checkpoint.load()
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    with torch.inference_mode():
        model(input_ids=context.calibration.rows)
    by_hand = [
        1 - float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean())
        for x, y in zip(seen[::2], seen[1::2], strict=True)
    ]
    assert context.measured["influence"] == pytest.approx(by_hand, abs=1e-5)
    (step,) = context.measured["removed"]
    assert step["layer"] == by_hand.index(min(by_hand))
    assert step["kl"] == pytest.approx(pruning.kl(checkpoint, made, context.calibration.rows), rel=1e-3)


@pytest.mark.parametrize("family", pruning.FAMILIES)
def test_the_greedy_search_removes_at_each_step_what_brute_force_would(family: str, tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of(family, tmp_path / "model")
    context = pruning.context(tmp_path, checkpoint)
    made = PruneDepth(layers=2).run(checkpoint, context)

    kept = [0, 1, 2, 3]
    for step in context.measured["removed"]:
        costs = {}
        for layer in kept:
            left = [i for i in kept if i != layer]
            tried = without_layers(checkpoint, left, pruning.context(tmp_path, checkpoint))
            costs[layer] = pruning.kl(checkpoint, tried, context.calibration.rows)
        assert step["layer"] == min(costs, key=lambda i: costs[i])
        assert step["kl"] == pytest.approx(min(costs.values()), rel=1e-3)
        kept.remove(step["layer"])
    assert made.config["num_hidden_layers"] == 2


@pytest.mark.parametrize("family", pruning.FAMILIES)
def test_the_result_loads_and_answers_as_the_model_without_those_layers(family: str, tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of(family, tmp_path / "model")
    made = without_layers(checkpoint, [0, 3], pruning.context(tmp_path, checkpoint))

    model = checkpoint.load()
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[0], layers[3]])
    if types := getattr(model.config, "layer_types", None):
        model.config.layer_types = [types[0], types[3]]
        assert made.load().config.layer_types == [types[0], types[3]]
    with torch.inference_mode():
        expected = model(input_ids=pruning.random_rows().rows, use_cache=False).logits
    assert torch.equal(pruning.logits(made), expected)


def test_layer_types_that_the_config_leaves_out_are_kept_with_their_layers(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("gemma2", tmp_path / "model")
    file = checkpoint.folder / "config.json"
    config = json.loads(file.read_text())
    types = config.pop("layer_types")
    file.write_text(json.dumps(config))
    old = Checkpoint.open(checkpoint.folder)
    made = without_layers(old, [1, 2, 3], pruning.context(tmp_path, old))
    assert made.load().config.layer_types == types[1:]


def test_a_ratio_is_of_the_whole_checkpoint_and_never_exceeded(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("llama, tied", tmp_path / "model")
    made = pruning.prune(PruneDepth(ratio=0.75, method="influence"), checkpoint, tmp_path)
    total = checkpoint.parameters
    layer = (total - 512 * 64 - 64) // 4
    assert made.config["num_hidden_layers"] == 2
    assert made.parameters == total - 2 * layer <= 0.75 * total < total - layer


def test_a_target_in_bytes_is_the_size_of_the_file(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model")
    three = pruning.prune(PruneDepth(layers=3, method="influence"), checkpoint, tmp_path)
    exact = PruneDepth(bytes=three.bytes + 1024, method="influence")  # room for a longer header
    assert pruning.prune(exact, checkpoint, tmp_path).bytes == three.bytes
    less = PruneDepth(bytes=three.bytes - 1024, method="influence")
    assert pruning.prune(less, checkpoint, tmp_path).config["num_hidden_layers"] == 2


def test_kl_is_to_the_source_also_where_that_is_another_model(tmp_path: Path) -> None:
    source = pruning.checkpoint_of("llama", tmp_path / "model")
    first = pruning.prune(PruneDepth(layers=3), source, tmp_path)
    context = pruning.context(tmp_path, source)
    made = PruneDepth(layers=2).run(first, context)
    measured = context.measured["removed"][0]["kl"]
    assert measured == pytest.approx(pruning.kl(source, made, context.calibration.rows), rel=1e-3)


def test_a_search_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model")

    def cut_off(what: str, done: int, total: int) -> None:
        assert (what, total) == ("removing layers", 3)
        seen.append(done)
        if done == 2 and len(seen) == 2:
            raise KeyboardInterrupt

    seen: list[int] = []
    context = replace(pruning.context(tmp_path, checkpoint), progress=cut_off)
    with pytest.raises(KeyboardInterrupt):
        PruneDepth(layers=1).run(checkpoint, context)
    assert not context.folder.exists()
    made = PruneDepth(layers=1).run(checkpoint, context)
    assert seen == [1, 2, 3]

    (tmp_path / "again").mkdir()
    whole = pruning.context(tmp_path / "again", checkpoint)
    assert PruneDepth(layers=1).run(checkpoint, whole).digest == made.digest
    assert whole.measured == context.measured


@pytest.mark.parametrize(
    ("target", "numbers"),
    [
        ({"ratio": 1.5}, "1.5"),
        ({"ratio": 0.2}, "with one layer left"),
        ({"layers": 0}, "0 layers cannot be kept"),
        ({"layers": 4}, "has 4"),
        ({"parameters": 10**9}, "a target of 1000000000 parameters"),
        ({"bytes": 10**9}, "a target of 1,000,000,000 bytes"),
    ],
)
def test_a_target_that_cannot_be_reached_is_refused_with_the_numbers(
    target: dict[str, float], numbers: str, tmp_path: Path
) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model")
    with pytest.raises(BadInput, match=numbers):
        pruning.prune(PruneDepth(**target), checkpoint, tmp_path)


@pytest.mark.parametrize("targets", [{}, {"ratio": 0.5, "layers": 2}])
def test_exactly_one_target(targets: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="exactly one of ratio, parameters, bytes, layers"):
        PruneDepth(**targets)


def test_the_search_loses_less_of_smollm2_than_dropping_any_two_layers(
    smollm2: Checkpoint, tmp_path: Path
) -> None:
    rows = Calibration.of_text(pruning.english(), smollm2.tokenizer(), 1, 96)
    context = pruning.context(tmp_path, smollm2, rows)
    PruneDepth(layers=28).run(smollm2, context)
    measured = context.measured["removed"][-1]["kl"]
    for other in ([0, 1], [10, 21], [28, 29]):
        kept = [i for i in range(30) if i not in other]
        tried = without_layers(smollm2, kept, pruning.context(tmp_path, smollm2))
        assert pruning.kl(smollm2, tried, rows.rows) > 1.5 * measured


def test_the_plan_counts_what_the_search_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model")
    context = pruning.context(tmp_path, checkpoint)
    run = dict.fromkeys(("layers", "heads"), 0)
    layer, log_probs = Blocks.layer, Blocks.log_probs

    def counted_layer(self: Blocks, index: int, hidden: torch.Tensor) -> torch.Tensor:
        run["layers"] += hidden.shape[0] * hidden.shape[1]
        return layer(self, index, hidden)

    def counted_log_probs(self: Blocks, hidden: torch.Tensor) -> torch.Tensor:
        run["heads"] += hidden.shape[0] * hidden.shape[1]
        return log_probs(self, hidden)

    monkeypatch.setattr(Blocks, "layer", counted_layer)
    monkeypatch.setattr(Blocks, "log_probs", counted_log_probs)
    greedy = PruneDepth(layers=1)
    greedy.run(checkpoint, context)
    size = sum(math.prod(s) for n, s in checkpoint.shapes.items() if ".layers.0." in n)
    head = math.prod(checkpoint.shapes["lm_head.weight"])
    measured = 2 * (run["layers"] * size + run["heads"] * head)
    assert greedy.flops(checkpoint, context.calibration.tokens) == pytest.approx(measured, rel=0.5)
    assert greedy.flops(checkpoint, 64) > PruneDepth(layers=1, method="influence").flops(checkpoint, 64)
