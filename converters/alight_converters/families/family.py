"""What a family of decoder models has to say about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Names of a family's parts. Paths are of modules, as `transformers` names them.

    Attributes:
        name: for people.
        model_types: what `config.json` calls it.
        gguf: the architecture's name in GGUF.
        layers: the list of decoder layers.
        queries, keys, values, output: attention projections, below a layer. A fused one is named in all
            its roles ("self_attn.qkv_proj" in queries, keys and values).
        gate, up, down: the feed-forward network's projections, below a layer.
        norms: the norms of a layer, in order of use, below a layer.
        embedding, final_norm, head: outside the layers; `head` is absent where it is tied.
    """

    name: str
    model_types: tuple[str, ...]
    gguf: str
    layers: str = "model.layers"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
