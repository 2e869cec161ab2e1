"""Qwen3, the dense models: queries and keys are normalized head by head."""

from __future__ import annotations

from alight_converters.compile_mlc.architecture import Architecture, Config, llama_like


def architecture(config: Config, _context: int) -> Architecture:
    """See `architecture_of`."""
    bias = bool(config.get("attention_bias"))
    return llama_like(
        config,
        head_norms=True,
        qkv_bias=bias,
        output_bias=bias,
        names={"self_attn.qkv_proj": "self_attn.c_attn"},
    )
