"""Gemma 2: norms on both sides, soft caps, and a window in every other layer."""

from __future__ import annotations

from typing import Any

from alight_converters.compile_mlc.architecture import Architecture, Config, llama_like


def architecture(config: Config, context: int) -> Architecture:
    """See `architecture_of`."""
    return llama_like(
        config,
        windows=windows(config, context, pattern=2),
        attention_softcap=float(config.get("attn_logit_softcapping") or 0),
        **shared(config),
    )


def shared(config: Config) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    return {
        "tied": True,
        "activation": "gelu_tanh",
        "sandwich_norms": True,
        "embedding_scale": config["hidden_size"] ** 0.5,
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "final_softcap": float(config.get("final_logit_softcapping") or 0),
    }


def windows(config: Config, context: int, pattern: int) -> tuple[int | None, ...]:
    """The window of each layer: all have one but the last of every `pattern`, unless the config lists them."""
    kinds = config.get("layer_types") or [
        "sliding_attention" if (layer + 1) % pattern else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    window = config["sliding_window"]
    return tuple(window if kind == "sliding_attention" and window < context else None for kind in kinds)
