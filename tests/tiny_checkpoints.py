"""Tiny random Hugging Face checkpoints of any family, with a tokenizer trained on the spot."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import tiny_tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY = 512
TEXT = Path(__file__).parent.parent / "README.md"


def llama_config(**changes: object) -> LlamaConfig:
    """A Llama of 4 layers whose widths are all different, so that a mixed-up axis fails loudly."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(sizes | changes))


def save(
    folder: Path,
    config: PretrainedConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokens: dict[str, Any] | None = None,
) -> Path:
    """Write a random checkpoint. Weights are wider than usual, so that logits differ clearly.

    `tokens` is the content of its `tokenizer.json`; a plain byte-level BPE unless given.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    gemma = config.model_type.startswith(
        "gemma"
    )  # whose norms are stored without the 1 that they multiply by
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(0.0 if gemma else 1.0, 0.1)
            else:
                weight.normal_(0.0, weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    if tokens is None:
        tokenizer().save_pretrained(folder)
    else:
        tiny_tokenizers.write(folder, tokens)
    return folder


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(TEXT)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def _gemma(kind: str, **changes: object) -> PretrainedConfig:
    sizes = {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "final_logit_softcapping": 20.0,
        "tie_word_embeddings": True,
        "num_hidden_layers": 8,
    }
    return family_config(kind, **(sizes | changes))


def family_config(kind: str, **changes: object) -> PretrainedConfig:
    """The tiny Llama's sizes in the config of another family."""
    base = llama_config(
        vocab_size=tiny_tokenizers.SIZE, rope_parameters={"rope_type": "default", "rope_theta": 50000.0}
    )
    sizes = {k: v for k, v in base.to_diff_dict().items() if k not in ("model_type", "architectures")}
    return AutoConfig.for_model(kind, **(sizes | changes))


def _rope(kind: str, **settings: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | settings}


def families() -> dict[str, tuple[PretrainedConfig, dict[str, Any]]]:
    """Every family, and every kind of rope scaling: a config, and a tokenizer as the family has it."""
    longrope = {
        "long_factor": [1.0 + 0.5 * n for n in range(6)],
        "short_factor": [1.0 + 0.1 * n for n in range(6)],
        "original_max_position_embeddings": 128,
        "partial_rotary_factor": 0.75,
    }
    gemma3_rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    }
    llama3 = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    byte_level, pieces = tiny_tokenizers.byte_level, tiny_tokenizers.pieces
    return {
        "llama2": (family_config("llama"), pieces("llama2")),
        "llama3": (family_config("llama", head_dim=32, **_rope("llama3", **llama3)), byte_level("llama3")),
        "llama-bias": (
            family_config("llama", attention_bias=True, **_rope("linear", factor=4.0)),
            byte_level("gpt-2"),
        ),
        "smollm2": (family_config("llama", tie_word_embeddings=True), byte_level("smollm")),
        "mistral": (family_config("mistral", head_dim=32, sliding_window=None), pieces("llama2")),
        "mistral-nemo": (family_config("mistral", sliding_window=None), byte_level("tekken")),
        "qwen2": (family_config("qwen2", tie_word_embeddings=True), byte_level("qwen2")),
        "qwen2-yarn": (
            family_config("qwen2", **_rope("yarn", factor=4.0, original_max_position_embeddings=64)),
            byte_level("qwen2"),
        ),
        "qwen3": (family_config("qwen3", head_dim=32), byte_level("qwen2")),
        "gemma2": (_gemma("gemma2", attn_logit_softcapping=30.0), pieces("gemma")),
        "gemma3": (_gemma("gemma3_text", rope_parameters=gemma3_rope), pieces("gemma")),
        "phi3": (family_config("phi3", pad_token_id=None), pieces("phi3")),
        "phi4": (family_config("phi3", pad_token_id=None), byte_level("dbrx")),
        "phi4-mini": (
            family_config("phi3", pad_token_id=None, **_rope("longrope", **longrope)),
            byte_level("gpt-4o"),
        ),
        "granite": (
            family_config(
                "granite",
                embedding_multiplier=3.0,
                residual_multiplier=0.5,
                attention_multiplier=0.2,
                logits_scaling=2.0,
            ),
            byte_level("smollm"),
        ),
    }
