"""Families name parts that are really there, under names that llama.cpp has."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoints
import torch
from transformers import AutoModelForCausalLM

from alight.errors import Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.gguf import from_gguf, to_gguf
from alight_converters.families import family_of, family_of_gguf, foreign, known

CONFIGS = {name: config for name, (config, _) in tiny_checkpoints.families().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_has_its_name(name: str) -> None:
    config = CONFIGS[name]
    family = family_of({"model_type": config.model_type})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = model.get_submodule(family.layers)[0]
    named = {
        path
        for path, module in layer.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    assert named == set(family.gguf_modules)
    for path in (family.embedding, family.final_norm, family.head):
        assert model.get_submodule(path).weight.ndim > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_values_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoints.save(tmp_path / "tiny", CONFIGS[name]))
    family, config = checkpoint.family, checkpoint.full_config
    changed = set()
    for tensor_name, tensor in checkpoint.tensors():
        theirs = to_gguf(family, config, tensor_name, tensor)
        assert theirs.shape == tensor.shape
        assert torch.allclose(from_gguf(family, config, tensor_name, theirs), tensor, atol=1e-6)
        if not torch.equal(theirs, tensor):
            changed.add(tensor_name.split(".")[-2])
    wanted = {"q_proj", "k_proj"} if family.rope_in_pairs else set()
    if family.norm_offset:
        wanted |= {n.split(".")[-2] for n in checkpoint.shapes if "norm" in n}
    assert changed == wanted


def test_all_are_tried() -> None:
    """A family without a tiny configuration would never be compared with llama.cpp."""
    assert {config.model_type for config in CONFIGS.values()} == set(known())


@pytest.mark.parametrize("kind", ["mamba", "", "bert"])
def test_an_unknown_family(kind: str) -> None:
    with pytest.raises(Unsupported, match=f"'{kind}' is not a family") as error:
        family_of({"model_type": kind})
    assert "docs/add-a-family.md" in error.value.hint and "qwen2" in error.value.hint
    with pytest.raises(Unsupported, match="GGUF architecture"):
        family_of_gguf(kind)


def test_a_checkpoint_in_another_dress() -> None:
    assert foreign({"model_type": "internlm2"}) and not foreign({"model_type": "llama"})
    with pytest.raises(Unsupported, match="has to be rewritten first") as error:
        family_of({"model_type": "internlm2"})
    assert "open_source" in error.value.hint
    assert family_of_gguf("llama").name == "Llama"
