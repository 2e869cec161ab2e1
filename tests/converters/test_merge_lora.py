"""LoRA adapters merged into weights, against W + scale · B·A written out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
from safetensors.torch import save_file

from alight.errors import BadInput, InvalidModelFile, Unsupported
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.merge_lora import MergeLora
from alight_converters.passes import Context
from alight_converters.sources import open_source

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
RANK = 4


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter as peft saves it."""
    folder.mkdir()
    usual = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "base_model_name_or_path": "somewhere/else"}
    (folder / "adapter_config.json").write_text(json.dumps(usual | config))
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def factors(module: str, shape: tuple[int, int], rank: int = RANK, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, shape[1], generator=generator),
        f"{module}.lora_B.weight": torch.randn(shape[0], rank, generator=generator),
    }


def run(tiny: Checkpoint, tmp_path: Path, source: Path, rows: Calibration, **settings: Any) -> Checkpoint:
    context = Context(tmp_path / "merged", tmp_path / "work", tiny, rows)
    return MergeLora(adapter=source, **settings).run(tiny, context)


@pytest.mark.parametrize(
    ("config", "settings", "wanted"),
    [
        ({}, {}, 8 / RANK),
        ({}, {"scale": 0.25}, 0.25 * 8 / RANK),
        ({"use_rslora": True}, {}, 8 / math.sqrt(RANK)),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, {}, 2 / RANK),
        ({"r": 16, "rank_pattern": {"q_proj": RANK}}, {}, 8 / RANK),
    ],
)
def test_the_sum_written_out(
    tiny: Checkpoint, tmp_path: Path, random_rows: Calibration, config: Any, settings: Any, wanted: float
) -> None:
    tensors = factors(Q, (64, 64))
    merged = run(tiny, tmp_path, adapter(tmp_path / "lora", tensors, **config), random_rows, **settings)
    delta = tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    for name, before in tiny.tensors():
        after = before + wanted * delta if name == f"{Q}.weight" else before
        assert torch.allclose(merged.tensor(name), after, atol=1e-6), name
    assert merged.config == tiny.config


def test_merged_is_what_the_adapter_computes(
    tiny: Checkpoint, tmp_path: Path, random_rows: Calibration
) -> None:
    """The path beside the weight, x·Aᵀ·Bᵀ, added by a hook to the base model."""
    tensors = factors(DOWN, (64, 160))
    merged = run(tiny, tmp_path, adapter(tmp_path / "lora", tensors), random_rows)
    a, b = tensors[f"{DOWN}.lora_A.weight"], tensors[f"{DOWN}.lora_B.weight"]
    base = tiny.load()
    base.get_submodule(DOWN).register_forward_hook(lambda _, args, out: out + 2.0 * args[0] @ a.T @ b.T)
    with torch.inference_mode():
        wanted, got = base(random_rows.rows[:2]).logits, merged.load()(random_rows.rows[:2]).logits
    assert torch.allclose(wanted, got, atol=1e-3)
    assert not torch.allclose(wanted, tiny.load()(random_rows.rows[:2]).logits, atol=1e-1)


def test_fan_in_fan_out(tiny: Checkpoint, tmp_path: Path, random_rows: Calibration) -> None:
    tensors = factors(DOWN, (160, 64))
    merged = run(tiny, tmp_path, adapter(tmp_path / "lora", tensors, fan_in_fan_out=True), random_rows)
    delta = (tensors[f"{DOWN}.lora_B.weight"] @ tensors[f"{DOWN}.lora_A.weight"]).T
    assert torch.allclose(
        merged.tensor(f"{DOWN}.weight"), tiny.tensor(f"{DOWN}.weight") + 2 * delta, atol=1e-6
    )


def test_the_dtype_stays(tmp_path: Path, random_rows: Calibration) -> None:
    config = tiny_checkpoints.llama_config()
    half = Checkpoint.open(tiny_checkpoints.save(tmp_path / "half", config, dtype=torch.bfloat16))
    merged = run(half, tmp_path, adapter(tmp_path / "lora", factors(Q, (64, 64))), random_rows)
    assert merged.tensor(f"{Q}.weight").dtype == torch.bfloat16


def test_modules_to_save(tiny: Checkpoint, tmp_path: Path, random_rows: Calibration) -> None:
    head = torch.randn(tiny_checkpoints.VOCABULARY, 64)
    source = adapter(
        tmp_path / "lora", {"lm_head.weight": head} | factors(Q, (64, 64)), modules_to_save=["lm_head"]
    )
    assert torch.equal(run(tiny, tmp_path, source, random_rows).tensor("lm_head.weight"), head)


def test_a_tied_head_is_untied(tmp_path: Path, random_rows: Calibration) -> None:
    config = tiny_checkpoints.llama_config(tie_word_embeddings=True)
    tied = Checkpoint.open(tiny_checkpoints.save(tmp_path / "tied", config))
    module, size = "model.embed_tokens", tiny_checkpoints.VOCABULARY
    tensors = {
        f"{module}.lora_embedding_A": torch.randn(RANK, size),
        f"{module}.lora_embedding_B": torch.randn(64, RANK),
    }
    merged = run(tied, tmp_path, adapter(tmp_path / "lora", tensors), random_rows)
    before = tied.tensor(f"{module}.weight")
    delta = (tensors[f"{module}.lora_embedding_B"] @ tensors[f"{module}.lora_embedding_A"]).T
    assert torch.allclose(merged.tensor(f"{module}.weight"), before + 2 * delta, atol=1e-6)
    assert torch.equal(merged.tensor("lm_head.weight"), before)
    assert merged.config["tie_word_embeddings"] is False
    assert torch.equal(merged.load().get_output_embeddings().weight, before)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (factors(Q, (128, 64)), r"q_proj.weight is \[64, 64\] in the model and \[128, 64\] in the adapter"),
        (
            factors("model.layers.9.mlp.up_proj", (160, 64)),
            "the model has no model.layers.9.mlp.up_proj.weight",
        ),
        ({"lm_head.weight": torch.zeros(7, 64)}, r"\[7, 64\] in the adapter"),
    ],
)
def test_an_adapter_of_another_base(
    tiny: Checkpoint, tmp_path: Path, random_rows: Calibration, tensors: Any, reason: str
) -> None:
    with pytest.raises(BadInput, match=reason) as error:
        run(tiny, tmp_path, adapter(tmp_path / "lora", tensors), random_rows)
    assert "somewhere/else" in error.value.hint
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("config", "kind", "reason"),
    [
        ({"peft_type": "IA3"}, Unsupported, "'IA3'"),
        ({"use_dora": True}, Unsupported, "DoRA"),
        ({"r": 0}, InvalidModelFile, "r = 0"),
        ({"lora_alpha": "much"}, InvalidModelFile, "lora_alpha = 'much'"),
    ],
)
def test_adapters_that_are_not_merged(
    tiny: Checkpoint, tmp_path: Path, random_rows: Calibration, config: Any, kind: type[BadInput], reason: str
) -> None:
    with pytest.raises(kind, match=reason):
        run(tiny, tmp_path, adapter(tmp_path / "lora", factors(Q, (64, 64)), **config), random_rows)


def test_damaged_adapters(tiny: Checkpoint, tmp_path: Path, random_rows: Calibration) -> None:
    with pytest.raises(BadInput, match="not a LoRA adapter"):
        run(tiny, tmp_path, tmp_path, random_rows)
    half = {n: t for n, t in factors(Q, (64, 64)).items() if "lora_A" in n}
    with pytest.raises(InvalidModelFile, match="only one of the two factors"):
        run(tiny, tmp_path, adapter(tmp_path / "half", half), random_rows)
    pickled = adapter(tmp_path / "pickled", factors(Q, (64, 64)))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(BadInput, match=r"no adapter_model\.safetensors"):
        run(tiny, tmp_path, pickled, random_rows)


def test_as_a_source(tiny: Checkpoint, tmp_path: Path) -> None:
    tensors = factors(Q, (64, 64))
    local = adapter(tmp_path / "local", tensors, base_model_name_or_path=str(tiny.folder))
    opened = open_source(local, tmp_path / "work")
    delta = tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    assert torch.allclose(opened.tensor(f"{Q}.weight"), tiny.tensor(f"{Q}.weight") + 2 * delta, atol=1e-6)
    remote = adapter(tmp_path / "remote", tensors)
    with pytest.raises(BadInput, match="'somewhere/else'") as error:
        open_source(remote, tmp_path / "work")
    assert "merge_lora" in error.value.hint
