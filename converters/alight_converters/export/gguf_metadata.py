"""The hyper-parameters of a GGUF, from a checkpoint's config."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from alight.errors import Unsupported
from alight_converters.families import Family
from alight_converters.families.family import Config

log = logging.getLogger(__name__)

USUAL = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
}  # `config.json` -> GGUF, where it follows the architecture's name and a dot
SLIDING_WINDOW, SLIDING_LAYERS = "attention.sliding_window", "attention.sliding_window_pattern"

Tensors = dict[str, torch.Tensor]


def hyper_parameters(family: Family, config: Config) -> tuple[dict[str, Any], Tensors]:
    """What llama.cpp has to know of a config: metadata without the architecture's prefix, and rope factors as tensors.

    Raises:
        Unsupported: llama.cpp cannot run this config exactly.
    """
    _refuse(family, config)
    found = {theirs: config[ours] for ours, theirs in USUAL.items()}
    head = head_size(config)
    found |= {"attention.key_length": head, "attention.value_length": head}
    found["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    given = {theirs: config.get(ours) for ours, theirs in family.gguf_keys.items()}
    found |= {key: float(value) for key, value in given.items() if value is not None}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and family.sliding_window:
        found[SLIDING_WINDOW] = int(window)
        found[SLIDING_LAYERS] = [kind == "sliding_attention" for kind in config["layer_types"]]
    elif window:
        log.warning(
            "llama.cpp runs %s without its sliding window of %d tokens: beyond that, answers differ",
            family.name,
            window,
        )
    rope, tensors = _rope(family, config)
    return found | rope, tensors


def head_size(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _refuse(family: Family, config: Config) -> None:
    act = config.get("hidden_activation") or config.get("hidden_act")
    reason = family.unsupported(config)
    if act != family.activation:
        reason = f"its activation is {act}; llama.cpp has {family.activation} for {family.name}"
    if reason:
        raise Unsupported(
            f"llama.cpp cannot run this {family.name} exactly: {reason}",
            hint="Use another export, for instance ONNX.",
        )


def _rope(family: Family, config: Config) -> tuple[dict[str, Any], Tensors]:
    """Metadata and tensors of the rotary embedding, of which Gemma 3 has a second one for its sliding layers."""
    rope = config["rope_parameters"]
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    rotated = int(head_size(config) * rope.get("partial_rotary_factor", 1.0))
    found = {"rope.dimension_count": rotated, "rope.freq_base": float(rope["rope_theta"])}
    if local:
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("default", "dynamic"):  # dynamic changes nothing within the context that we announce
        return found, {}
    if kind == "linear":
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}, {}
    if kind == "yarn":
        return found | _yarn(rope, config), {}
    if kind == "llama3" and kind in family.rope_tables:
        return found, {"rope_freqs.weight": llama3_factors(rope, rotated)}
    if kind == "longrope" and kind in family.rope_tables:
        return found | _longrope(rope, config), {
            f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
            for which in ("long", "short")
        }
    raise Unsupported(
        f"llama.cpp has no rope scaling {kind!r} for {family.name}",
        hint="Remove it from config.json and use the shorter context, or use another export.",
    )


def _yarn(rope: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """YaRN (Peng et al. 2023). llama.cpp's own attention factor is 0.1 ln(factor) + 1; ours multiplies it."""
    factor = float(rope["factor"])
    wanted = rope.get("attention_factor")
    if wanted is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        own, other = (0.1 * rope[m] * math.log(factor) + 1.0 for m in ("mscale", "mscale_all_dim"))
        wanted = own / other
    found = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": _original(rope, config),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }
    return (
        found
        if wanted is None
        else found | {"rope.scaling.attn_factor": float(wanted) / yarn_attention(factor)}
    )


def yarn_attention(factor: float) -> float:
    """What llama.cpp multiplies attention scores' rotary parts by, for a YaRN of this factor."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """LongRoPE (Ding et al. 2024): both engines take the short factors up to the original context."""
    original = _original(rope, config)
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(rope.get("attention_factor") or usual),
    }


def _original(rope: Mapping[str, Any], config: Config) -> int:
    return int(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])


def llama3_factors(rope: Mapping[str, Any], rotated: int) -> torch.Tensor:
    """What Llama 3.1 divides each frequency by: 1 for short waves, `factor` for long ones, between them a ramp."""
    frequencies = rope["rope_theta"] ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: torch.Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return divisors.float()
