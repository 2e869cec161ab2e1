"""Qwen3, the dense models."""

from alight_converters.families.family import Family

FAMILY = Family(
    name="Qwen3",
    model_types=("qwen3",),
    gguf="qwen3",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)
