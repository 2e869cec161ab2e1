"""The model families that can be compiled, by MLC's `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from alight.errors import Unsupported
from alight_converters.compile_mlc.architecture import Architecture, Config
from alight_converters.compile_mlc.families import gemma2, gemma3, llama, phi3, qwen2, qwen3

_FAMILIES: Mapping[str, Callable[[Config, int], Architecture]] = {
    "llama": llama.architecture,
    "mistral": llama.architecture,
    "qwen2": qwen2.architecture,
    "qwen3": qwen3.architecture,
    "gemma2": gemma2.architecture,
    "gemma3_text": gemma3.architecture,
    "phi3": phi3.architecture,
}


def architecture_of(config: Mapping[str, Any], context: int) -> Architecture:
    """The decoder that an `mlc-chat-config.json` describes, for conversations of `context` tokens.

    Raises:
        Unsupported: unknown family, or a variant of one that is not. InvalidModelFile: the config lacks something.
    """
    model_type = str(config.get("model_type"))
    if model_type not in _FAMILIES:
        raise Unsupported(
            f"no MLC library can be compiled for {model_type!r}",
            hint=f"Known: {', '.join(sorted(_FAMILIES))}.",
        )
    return replace(_FAMILIES[model_type](config["model_config"], context), model_type=model_type)
