"""Llama 2 and 3, Mistral, SmolLM2."""

from __future__ import annotations

from alight.errors import Unsupported
from alight_converters.compile_mlc.architecture import Architecture, Config, Rope, llama_like, rope_base


def architecture(config: Config, context: int) -> Architecture:
    """See `architecture_of`."""
    window = config.get("sliding_window")
    if window and window < context:
        raise Unsupported(
            f"the model sees {window} tokens back and a context of {context} is asked for",
            hint=f"Compile it for a context of {window} or less.",
        )
    scaling = config.get("rope_scaling")
    if scaling and scaling.get("rope_type") == "llama3":
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return llama_like(config, rope=Rope.llama3(rope_base(config), width, scaling))
    return llama_like(config)
