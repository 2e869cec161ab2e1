"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini. Queries, keys and values are one matrix; gate and up are another."""

from alight_converters.families.family import Family

FAMILY = Family(
    name="Phi-3",
    model_types=("phi3",),
    gguf="phi3",
    queries="self_attn.qkv_proj",
    keys="self_attn.qkv_proj",
    values="self_attn.qkv_proj",
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
    rope_tables=("longrope",),
)
