"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: a Llama under other names, of which a part of each head may be rotated."""

from __future__ import annotations

from alight.errors import Unsupported
from alight_converters.compile_mlc.architecture import Architecture, Config, Rope, llama_like, rope_base

_NAMES = {
    "model.layers.": "transformer.h.",
    "model.embed_tokens.": "transformer.embd.",
    "model.norm.": "transformer.norm.",
    ".input_layernorm.": ".ln.",
    ".self_attn.qkv_proj.": ".mixer.qkv_proj.",
    ".self_attn.o_proj.": ".mixer.out_proj.",
}


def architecture(config: Config, context: int) -> Architecture:
    """See `architecture_of`."""
    base, width = rope_base(config), int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
    scaling = config.get("rope_scaling")
    if not scaling:
        return llama_like(config, rope=Rope.plain(base, width), names=_NAMES)
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind != "longrope":
        raise Unsupported(f"rope scaling {kind!r} cannot be compiled", hint="Use another format.")
    original = config["original_max_position_embeddings"]
    trained = config.get("max_position_embeddings") or config["context_window_size"]
    rope = Rope.longrope(base, width, scaling, original, trained, context)
    return llama_like(config, rope=rope, names=_NAMES)
