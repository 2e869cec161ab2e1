"""InternLM2 and 2.5: a Llama with other names, whose own code alight does not run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alight_converters.families.family import Config
from alight_converters.families.foreign import Foreign

if TYPE_CHECKING:
    import torch

_NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def _config(config: Config) -> dict[str, Any]:
    ours = {key: config[key] for key in _KEPT if key in config}
    bias = bool(config.get("bias", False))
    return ours | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": bias}


def _tensors(name: str, tensor: torch.Tensor, config: Config) -> list[tuple[str, torch.Tensor]]:
    path, _, kind = name.rpartition(".")
    layer, found, part = path.partition("attention.wqkv")
    if found and not part:
        # Each group of heads that share a key has its queries, then the key, then the value.
        heads, shared = config["num_attention_heads"], config.get("num_key_value_heads")
        groups = shared or heads
        rows = tensor.reshape(groups, heads // groups + 2, -1, *tensor.shape[1:])
        return [
            (f"{layer}self_attn.{role}_proj.{kind}", part.reshape(-1, *tensor.shape[1:]).contiguous())
            for role, part in (("q", rows[:, :-2]), ("k", rows[:, -2]), ("v", rows[:, -1]))
        ]
    for theirs, ours in _NAMES.items():
        if path == theirs or path.endswith(f".{theirs}"):
            return [(f"{path.removesuffix(theirs)}{ours}.{kind}", tensor)]
    return [(name, tensor)]


INTERNLM2 = Foreign(model_type="internlm2", config=_config, tensors=_tensors)
