"""Tiny random Hugging Face checkpoints of any family, with a tokenizer trained on the spot."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

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
    folder: Path, config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a random checkpoint. Weights are wider than usual, so that logits differ clearly."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(
                1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else weight.shape[-1] ** -0.5
            )
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
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
