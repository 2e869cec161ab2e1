"""What a family of decoder models has to say about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]  # `config.json` with all of its defaults filled in


@dataclass(frozen=True, slots=True)
class Family:
    """Names of a family's parts, and what llama.cpp has to be told. Paths are of modules, as `transformers` names them.

    Attributes:
        name: for people.
        model_types: what `config.json` calls it.
        gguf: the architecture's name in GGUF.
        layers: the list of decoder layers.
        queries, keys, values, output: attention projections, below a layer. A fused one is named in all
            its roles ("self_attn.qkv_proj" in queries, keys and values).
        query_norm, key_norm: norms of each head's queries and keys, below a layer; empty where there are none.
        gate, up, down: the feed-forward network's projections, below a layer. Fused: as above.
        norms: the norms of a layer, in order of use, below a layer.
        embedding, final_norm, head: outside the layers; `head` is absent where it is tied.
        gguf_norms: what GGUF calls `norms`, in the same order.
        gguf_keys: factors and limits of this family alone: name in `config.json` -> name in GGUF, both floats.
        sliding_window: llama.cpp applies `sliding_window` to the layers that `layer_types` says; of other
            families it ignores it.
        norm_offset: a norm multiplies by its weight plus this. (llama.cpp wants the sum.)
        rope_in_pairs: llama.cpp rotates neighbouring rows of queries and keys, where transformers rotates
            one half of a head against the other: the rows are put in that order.
        rope_tables: the rope scalings that llama.cpp reads from a table of factors in files of this
            architecture: "llama3", "longrope". (It computes linear and YaRN for all of them.)
        activation: of the feed-forward network; llama.cpp has it fixed for each architecture.
        unsaid: config entries that a GGUF of this family leaves out, from those that it has.
        unsupported: why llama.cpp cannot run a config of this family exactly; empty if it can.
    """

    name: str
    model_types: tuple[str, ...]
    gguf: str
    layers: str = "model.layers"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str = ""
    key_norm: str = ""
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    gguf_norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    gguf_keys: Mapping[str, str] = field(default_factory=dict)
    sliding_window: bool = False
    norm_offset: float = 0.0
    rope_in_pairs: bool = False
    rope_tables: tuple[str, ...] = ()
    activation: str = "silu"
    unsaid: Callable[[Config], dict[str, Any]] = lambda _: {}
    unsupported: Callable[[Config], str] = lambda _: ""

    @property
    def gguf_modules(self) -> dict[str, str]:
        """Modules below a layer -> their names in a GGUF."""
        fused_qkv, fused_gate = self.queries == self.keys, self.gate == self.up
        names = {self.queries: "attn_qkv" if fused_qkv else "attn_q"}
        if not fused_qkv:
            names |= {self.keys: "attn_k", self.values: "attn_v"}
        names |= {self.output: "attn_output", self.down: "ffn_down", self.up: "ffn_up"}
        if not fused_gate:
            names[self.gate] = "ffn_gate"
        if self.query_norm:
            names |= {self.query_norm: "attn_q_norm", self.key_norm: "attn_k_norm"}
        return names | dict(zip(self.norms, self.gguf_norms, strict=True))
