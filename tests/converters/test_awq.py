"""AWQ: the same function, and less lost when it is rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoints
import torch
from gguf import GGMLQuantizationType, quants
from planted_outliers import with_outliers
from transformers import Gemma2Config, Phi3Config, Qwen2Config

from alight.errors import Unsupported
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Context
from alight_converters.quantize.awq import Awq


def context(checkpoint: Checkpoint, rows: Calibration, folder: Path) -> Context:
    return Context(folder, folder.parent / "work", checkpoint, rows)


def logits(checkpoint: Checkpoint, rows: Calibration, *, q4_0: bool = False) -> torch.Tensor:
    model = checkpoint.load()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if q4_0 and "proj" in name:
                packed = quants.quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
                weight.copy_(torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q4_0)))
        found: torch.Tensor = model(rows.rows).logits
    return found


SIZES = {
    "vocab_size": tiny_checkpoints.VOCABULARY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
CONFIGS = {
    "llama": tiny_checkpoints.llama_config(),
    "tied, with biases": tiny_checkpoints.llama_config(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "qwen2": Qwen2Config(**SIZES),
    "phi3, fused": Phi3Config(**SIZES),
    "gemma2, norms plus one": Gemma2Config(**SIZES, head_dim=32),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_function_stays(config: object, random_rows: Calibration, tmp_path: Path) -> None:
    before = Checkpoint.open(tiny_checkpoints.save(tmp_path / "before", config))  # type: ignore[arg-type]
    after = Awq(block=16).run(before, context(before, random_rows, tmp_path / "after"))
    assert torch.allclose(logits(after, random_rows), logits(before, random_rows), atol=1e-4, rtol=1e-4)
    changed = [n for n, t in after.tensors() if not torch.equal(t, before.tensor(n))]
    assert len(changed) > len(after.shapes) // 2, "it did something"


def test_planted_outliers_are_kept_by_q4_0(
    tiny: Checkpoint, random_rows: Calibration, tmp_path: Path
) -> None:
    before = with_outliers(tiny, tmp_path / "before")
    told = context(before, random_rows, tmp_path / "after")
    after = Awq().run(before, told)
    exact = logits(before, random_rows)
    plain, better = (logits(c, random_rows, q4_0=True) for c in (before, after))
    assert (better - exact).square().mean() < 0.7 * (plain - exact).square().mean()
    error = told.measured["relative_output_error"]
    assert error["after"] < error["before"]
    assert 0 < told.measured["mean_strength"] <= 1


def test_blocks_have_to_divide_the_widths(tiny: Checkpoint, random_rows: Calibration, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"o_proj has 64 columns|q_proj has 64 columns"):
        Awq(block=48).run(tiny, context(tiny, random_rows, tmp_path / "after"))
    assert not (tmp_path / "after").exists()
