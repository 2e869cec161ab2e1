"""Width pruning: the units that matter least go, and what is left is a model that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pruning
import pytest
import torch

from alight.errors import BadInput, Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.prune.importance import by_activation, by_gradient
from alight_converters.prune.structure import Structure
from alight_converters.prune.width import PruneWidth

DEAD_HIDDEN = torch.arange(3, 64, 4)  # 16 of 64
DEAD_CHANNELS = torch.arange(1, 160, 5)  # 32 of 160
LIVE_GROUP = (0, 1, 1, 0)  # of two, for each layer


def with_dead_units(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with units that do nothing: hidden channels that nobody writes to, feed-forward channels
    whose `up` is zero, groups whose values are zero. In a fused matrix those are its last rows."""
    family = checkpoint.family

    def tensors() -> object:
        for name, whole in checkpoint.tensors():
            tensor = whole.clone()
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
            module = name.split(".", 3)[-1].rpartition(".")[0]
            if name == "model.embed_tokens.weight":
                tensor[:, DEAD_HIDDEN] = 0
            elif module in (family.output, family.down):
                tensor[DEAD_HIDDEN] = 0
            elif module == family.up:
                tensor[len(tensor) - 160 + DEAD_CHANNELS] = 0
            elif module == family.values:
                values = tensor[len(tensor) - 2 * head_dim :].unflatten(0, (2, head_dim))
                values[1 - LIVE_GROUP[layer]] = 0
            yield name, tensor

    head_dim = Structure(checkpoint).head_dim
    return checkpoint.with_tensors(tensors(), folder)


@pytest.mark.parametrize("method", ["activation", "gradient"])
@pytest.mark.parametrize("family", pruning.FAMILIES)
def test_units_without_effect_go_and_no_logit_changes(
    family: str, method: Literal["activation", "gradient"], tmp_path: Path
) -> None:
    checkpoint = with_dead_units(pruning.checkpoint_of(family, tmp_path / "model"), tmp_path / "dead")
    before = pruning.logits(checkpoint)
    config = PruneWidth(method=method, sizes={"hidden": 48, "channels": 128, "groups": 1})
    made = pruning.prune(config, checkpoint, tmp_path)
    assert made.config["hidden_size"] == 48
    assert made.config["intermediate_size"] == 128
    assert (made.config["num_attention_heads"], made.config["num_key_value_heads"]) == (2, 1)
    torch.testing.assert_close(pruning.logits(made), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


@pytest.mark.parametrize("family", pruning.FAMILIES)
def test_the_result_answers_as_the_model_with_the_other_units_switched_off(
    family: str, tmp_path: Path
) -> None:
    checkpoint = pruning.checkpoint_of(family, tmp_path / "model")
    made = pruning.prune(PruneWidth(sizes={"channels": 96, "groups": 1}), checkpoint, tmp_path)

    model = checkpoint.load()
    names = checkpoint.family
    for number, layer in enumerate(model.model.layers):
        for path in (names.down, names.output):
            weight = layer.get_submodule(path).weight.data
            left = made.tensor(f"model.layers.{number}.{path}.weight")
            stays = (weight[:, :, None] == left[:, None, :]).all(0).any(1)
            assert int(stays.sum()) == left.shape[1]
            weight[:, ~stays] = 0
    with torch.inference_mode():
        expected = model(input_ids=pruning.random_rows().rows).logits
    torch.testing.assert_close(pruning.logits(made), expected, rtol=1e-4, atol=1e-4)


def test_each_layer_keeps_its_own_strongest_channels(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model")
    strong = [torch.arange(layer, 160, 5) for layer in range(4)]

    def tensors() -> object:
        for name, tensor in checkpoint.tensors():
            if "up_proj" in name:
                tensor[strong[int(name.split(".")[2])]] *= 20
            yield name, tensor

    planted = checkpoint.with_tensors(tensors(), tmp_path / "planted")
    made = pruning.prune(PruneWidth(sizes={"channels": 32}), planted, tmp_path)
    for layer in range(4):
        for path, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            name = f"model.layers.{layer}.mlp.{path}.weight"
            assert torch.equal(made.tensor(name), planted.tensor(name).index_select(axis, strong[layer]))


def test_importance_by_activation_is_minitrons(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("qwen3", tmp_path / "model")
    rows = pruning.random_rows().rows
    model = checkpoint.load()
    found = by_activation(model, checkpoint.family, Structure(checkpoint), rows).importance

    layers = model.model.layers
    seen: dict[str, torch.Tensor] = {}
    layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(channels=args[0]))
    layers[2].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    normed: list[torch.Tensor] = []
    for norm in [model.model.norm] + [
        n for x in layers for n in (x.input_layernorm, x.post_attention_layernorm)
    ]:
        norm.register_forward_hook(lambda _, __, out: normed.append(out))
    with torch.inference_mode():
        model(input_ids=rows)
    group = seen["heads"][..., 48:]  # two heads of 24 in each of two groups
    assert float(found["groups"][2, 1]) == pytest.approx(
        float(group.square().sum(-1).sqrt().mean(1).square().sum().sqrt()), rel=1e-4
    )
    assert float(found["channels"][2, 7]) == pytest.approx(
        float(seen["channels"][..., 7].abs().mean(1).square().sum().sqrt()), rel=1e-4
    )
    by_norm = [float(out[..., 9].abs().mean(1).square().sum().sqrt()) for out in normed]
    assert len(by_norm) == 9
    assert float(found["hidden"][9]) == pytest.approx(sum(by_norm), rel=1e-4)


def test_importance_by_gradient_is_first_order_taylor(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("phi3", tmp_path / "model")
    rows = pruning.random_rows(2).rows
    model = checkpoint.load()
    found = by_gradient(model, Structure(checkpoint), rows)
    layer = model.model.layers[1]
    channel = group = hidden = 0.0
    for row in rows:
        model.zero_grad()
        logits = model(input_ids=row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:]).backward()
        effect = {name: (w * w.grad).abs() for name, w in model.named_parameters()}
        gate_up = effect["model.layers.1.mlp.gate_up_proj.weight"]
        down = effect["model.layers.1.mlp.down_proj.weight"]
        channel += float(gate_up[5].sum() + gate_up[165].sum() + down[:, 5].sum())
        qkv = effect["model.layers.1.self_attn.qkv_proj.weight"]  # 4 heads of 16, 2 keys, 2 values
        output = effect["model.layers.1.self_attn.o_proj.weight"]
        group += float(qkv[32:64].sum() + qkv[80:96].sum() + qkv[112:128].sum() + output[:, 32:].sum())
        writes = ("o_proj", "down_proj", "norm")
        for name, e in effect.items():
            hidden += float((e[9] if any(part in name for part in writes) else e[:, 9]).sum())
    assert layer.mlp.gate_up_proj.weight.shape[0] == 320
    assert float(found["channels"][1, 5]) == pytest.approx(channel, rel=1e-4)
    assert float(found["groups"][1, 1]) == pytest.approx(group, rel=1e-4)
    assert float(found["hidden"][9]) == pytest.approx(hidden, rel=1e-4)


@pytest.mark.parametrize("family", pruning.FAMILIES)
def test_a_ratio_gives_block_multiples_and_is_never_exceeded(family: str, tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of(family, tmp_path / "model")
    context = pruning.context(tmp_path, checkpoint)
    made = PruneWidth(ratio=0.6, axes=("channels", "groups", "hidden")).run(checkpoint, context)
    widths = context.measured["widths"]
    assert made.parameters == context.measured["parameters"] == Structure(made).parameters(widths)
    assert made.parameters <= 0.6 * checkpoint.parameters
    assert widths["hidden"] in (32, 64)
    assert widths["channels"] % 32 == 0
    assert made.load().config.head_dim == Structure(checkpoint).head_dim
    made.check()


def test_widths_of_k_quants_stay_multiples_of_256(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model", intermediate_size=1024)
    made = pruning.prune(PruneWidth(ratio=0.7), checkpoint, tmp_path)
    assert made.config["intermediate_size"] == 512
    finer = pruning.prune(PruneWidth(ratio=0.7, multiple=8), checkpoint, tmp_path)
    assert 512 < finer.config["intermediate_size"] < 768
    assert finer.config["intermediate_size"] % 8 == 0
    assert finer.parameters > 0.69 * checkpoint.parameters


def test_tied_embeddings_stay_tied_and_the_dtype_is_kept(tmp_path: Path) -> None:
    config = pruning.FAMILIES["gemma2"]
    folder = pruning.tiny_checkpoints.save(tmp_path / "model", config, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(folder)
    made = pruning.prune(PruneWidth(sizes={"hidden": 32}), checkpoint, tmp_path)
    assert "lm_head.weight" not in made.shards
    model = made.load()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {tensor.dtype for _, tensor in made.tensors()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"ratio": 0.0}, "ratio 0 is not between"),
        ({"ratio": 0.1}, "when channels are at their narrowest"),
        ({"bytes": 10**9}, "a target of 1,000,000,000 bytes"),
        ({"sizes": {"channels": 161}}, "sizes {'channels': 161}"),
        ({"sizes": {"channels": 160}}, "one is smaller"),
        ({"sizes": {"hidden": 33}}, "transformers does not load"),
    ],
)
def test_a_target_that_cannot_be_reached_is_refused_with_the_numbers(
    target: dict[str, float], message: str, tmp_path: Path
) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model")
    with pytest.raises(BadInput, match=message):
        pruning.prune(PruneWidth(**target), checkpoint, tmp_path)


def test_a_tensor_that_the_family_does_not_name_is_refused(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model")
    extra = [*checkpoint.tensors(), ("model.layers.0.self_attn.sinks", torch.zeros(4))]
    strange = checkpoint.with_tensors(extra, tmp_path / "strange")
    with pytest.raises(Unsupported, match="sinks"):
        pruning.prune(PruneWidth(ratio=0.8), strange, tmp_path)
