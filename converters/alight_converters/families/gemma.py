"""Gemma 2 and 3 (of the latter the text model)."""

from __future__ import annotations

from typing import Any

from alight_converters.families.family import Config, Family
from alight_converters.families.foreign import Foreign

_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
_GGUF_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_27B = {
    "gemma2": 46,
    "gemma3_text": 62,
}  # layers, which is how llama.cpp knows the models that scale otherwise


def _scalar(config: Config) -> float:
    """What llama.cpp divides attention scores by, squared."""
    if config["num_hidden_layers"] == _27B[config["model_type"]]:
        return float(config["hidden_size"] // config["num_attention_heads"])
    return float(config["head_dim"])


def _unsaid(config: Config) -> dict[str, Any]:
    return {"query_pre_attn_scalar": int(_scalar(config))}


def _unsupported(config: Config) -> str:
    if config["query_pre_attn_scalar"] != _scalar(config):
        return (
            f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}; llama.cpp takes {_scalar(config):g}"
        )
    if config.get("use_bidirectional_attention"):
        return "use_bidirectional_attention is set; llama.cpp looks back only"
    if config["model_type"] == "gemma3_text" and config.get("attn_logit_softcapping"):
        return "attn_logit_softcapping is set; llama.cpp has none for Gemma 3"
    return ""


GEMMA2 = Family(
    name="Gemma 2",
    model_types=("gemma2",),
    gguf="gemma2",
    norms=_NORMS,
    gguf_norms=_GGUF_NORMS,
    gguf_keys={
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    sliding_window=True,
    norm_offset=1.0,
    activation="gelu_pytorch_tanh",
    unsaid=_unsaid,
    unsupported=_unsupported,
)

GEMMA3 = Family(
    name="Gemma 3",
    model_types=("gemma3_text",),
    gguf="gemma3",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    norms=_NORMS,
    gguf_norms=_GGUF_NORMS,
    gguf_keys={"final_logit_softcapping": "final_logit_softcapping"},
    sliding_window=True,
    norm_offset=1.0,
    activation="gelu_pytorch_tanh",
    unsaid=_unsaid,
    unsupported=_unsupported,
)


def _text_name(name: str) -> str | None:
    """Two spellings are about: `language_model.model.layers…` and, newer, `model.language_model.layers…`."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    return name if name == "lm_head.weight" else None


GEMMA3_WITH_VISION = Foreign(
    model_type="gemma3",
    config=lambda config: dict(config["text_config"]) | {"model_type": "gemma3_text"},
    tensors=lambda name, tensor, _: [(text, tensor)] if (text := _text_name(name)) else [],
)
