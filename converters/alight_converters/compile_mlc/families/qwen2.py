"""Qwen2 and Qwen2.5: queries, keys and values have a bias."""

from __future__ import annotations

from alight_converters.compile_mlc.architecture import Architecture, Config, llama_like


def architecture(config: Config, _context: int) -> Architecture:
    """See `architecture_of`."""
    return llama_like(config, qkv_bias=True, names={"self_attn.qkv_proj": "self_attn.c_attn"})
