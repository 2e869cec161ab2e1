"""What the tests of pruning share: a tiny checkpoint of each family, and running a pass on it."""

from __future__ import annotations

from pathlib import Path

import tiny_checkpoints
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Context, Pass

SIZES = {
    "vocab_size": tiny_checkpoints.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
WINDOW = {"sliding_window": 8, "query_pre_attn_scalar": 24}  # shorter than the rows: it has to matter

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": tiny_checkpoints.llama_config(),
    "llama, tied": tiny_checkpoints.llama_config(tie_word_embeddings=True, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES, head_dim=24),
    "gemma2": Gemma2Config(**SIZES, **WINDOW, head_dim=24, final_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**SIZES, **WINDOW, head_dim=24, sliding_window_pattern=2),
    "phi3": Phi3Config(**SIZES),
}


def english() -> str:
    """Real text, a few thousand words: alight's own documentation."""
    return "\n\n".join(
        file.read_text() for file in sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    )


def checkpoint_of(family: str, folder: Path, **changes: object) -> Checkpoint:
    """A tiny random checkpoint; `changes` are of its config."""
    config = type(FAMILIES[family])(**(FAMILIES[family].to_dict() | changes))
    return Checkpoint.open(tiny_checkpoints.save(folder, config))


def random_rows(rows: int = 8, length: int = 32) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    return Calibration(
        torch.randint(2, tiny_checkpoints.VOCABULARY, (rows, length), generator=generator), "random"
    )


def context(folder: Path, source: Checkpoint, calibration: Calibration | None = None) -> Context:
    """A context that writes to a new folder below this one."""
    number = len(list(folder.glob("made-*")))
    return Context(folder / f"made-{number}", folder / "work", source, calibration or random_rows())


def prune(
    config: Pass, checkpoint: Checkpoint, folder: Path, calibration: Calibration | None = None
) -> Checkpoint:
    return config.run(checkpoint, context(folder, checkpoint, calibration))


@torch.inference_mode()
def logits(checkpoint: Checkpoint, rows: torch.Tensor | None = None) -> torch.Tensor:
    return torch.as_tensor(checkpoint.load()(input_ids=random_rows().rows if rows is None else rows).logits)


@torch.inference_mode()
def kl(source: Checkpoint, pruned: Checkpoint, rows: torch.Tensor) -> float:
    """Mean KL(source || pruned) per token, in nats, by the models' own forward passes."""
    p, q = (logits(model, rows).double().log_softmax(-1) for model in (source, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())
