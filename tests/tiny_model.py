"""A tiny Llama with random float32 weights: loads in milliseconds, and its logits have no near ties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf_writer import F32, gguf

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 128, 2


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {b: chr(b) for b in plain}
    others = (b for b in range(256) if b not in stand_in)
    stand_in |= {b: chr(256 + i) for i, b in enumerate(others)}
    return [stand_in[b] for b in range(256)]


def tiny_model(
    path: Path, *, seed: int = 0, layers: int = LAYERS, context: int = 512, mrope: bool = False
) -> Path:
    """Write the model to `path`. Its tokens are the 256 bytes, "th", and an end token (257).

    Args:
        mrope: a Qwen2-VL instead: positions have several dimensions, so that images can be flat.
    """
    random = np.random.default_rng(seed)
    tokens = [*_byte_tokens(), "th", "<|end|>"]
    vocabulary = len(tokens)
    metadata = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": layers,
        "llama.context_length": context,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "llama.vocab_size": vocabulary,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (vocabulary - 1) + [3],
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": vocabulary - 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    shapes["output.weight"] = (vocabulary, HIDDEN)
    kv = HIDDEN // HEADS * KV_HEADS
    for i in range(layers):
        block = {
            "attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,), "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
        if mrope:
            shapes |= {
                f"blk.{i}.attn_q.bias": (HIDDEN,),
                f"blk.{i}.attn_k.bias": (kv,),
                f"blk.{i}.attn_v.bias": (kv,),
            }
    if mrope:
        metadata = {key.replace("llama.", "qwen2vl."): value for key, value in metadata.items()}
        metadata["general.architecture"] = "qwen2vl"
        metadata["qwen2vl.rope.dimension_sections"] = [2, 3, 3, 0]
    return written(path, metadata, shapes, random)


def tiny_adapter(path: Path, *, seed: int = 1, rank: int = 4) -> Path:
    """A LoRA adapter for it, strong enough to change what it says."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(LAYERS):
        shapes[f"blk.{i}.attn_q.weight.lora_a"] = (rank, HIDDEN)
        shapes[f"blk.{i}.attn_q.weight.lora_b"] = (HIDDEN, rank)
        shapes[f"blk.{i}.ffn_up.weight.lora_a"] = (rank, HIDDEN)
        shapes[f"blk.{i}.ffn_up.weight.lora_b"] = (FFN, rank)
    metadata = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    return written(path, metadata, shapes, np.random.default_rng(seed), scale=0.5)


def written(
    path: Path,
    metadata: dict[str, object],
    shapes: dict[str, tuple[int, ...]],
    random: np.random.Generator,
    scale: float = 0.25,
) -> Path:
    """A GGUF with random matrices and vectors of ones."""
    data, table = b"", []
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else random.normal(0, scale, shape)
        table.append((name, tuple(reversed(shape)), F32, len(data)))
        data += values.astype(np.float32).tobytes()
        data += bytes(-len(data) % 32)
    path.write_bytes(gguf(metadata, table, data))
    return path
