"""The decoder of every family, as a module of tvm's: what its functions compute, and under which signatures.

The signatures are those by which mlc_llm's engine and web-llm call a library (mlc_llm: cpp/serve/function_table.cc).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from alight_converters.compile_mlc.architecture import Architecture, Rope
from alight_converters.compile_mlc.kv_cache import create_cache
from alight_converters.compile_mlc.layers import Linear, Norm, Setting, Weights, cast

_CACHE_SIZES = (
    "max_batch_size",
    "max_total_seq_len",
    "prefill_chunk_size",
    "page_size",
    "support_sliding_window",
)

Tables = dict[Rope, Tensor]


class Attention(nn.Module):  # type: ignore[misc]
    def __init__(self, arch: Architecture, setting: Setting) -> None:
        super().__init__()
        self.arch, self.setting = arch, setting
        queries, keys = arch.heads * arch.head, arch.kv_heads * arch.head
        if arch.fused_qkv:
            self.qkv_proj = Linear(queries + 2 * keys, arch.hidden, setting, bias=arch.qkv_bias)
        else:
            self.q_proj = Linear(queries, arch.hidden, setting, bias=arch.qkv_bias)
            self.k_proj = Linear(keys, arch.hidden, setting, bias=arch.qkv_bias)
            self.v_proj = Linear(keys, arch.hidden, setting, bias=arch.qkv_bias)
        if arch.head_norms:
            self.q_norm = Norm(arch.head, arch.epsilon, setting)
            self.k_norm = Norm(arch.head, arch.epsilon, setting)
        self.o_proj = Linear(arch.hidden, queries, setting, bias=arch.output_bias)

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int, table: Tensor) -> Tensor:
        arch = self.arch
        batch, tokens, _ = x.shape
        if arch.fused_qkv:
            qkv = self.qkv_proj(x)
        else:
            qkv = op.concat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qkv = op.reshape(qkv, (batch, tokens, arch.heads + 2 * arch.kv_heads, arch.head))
        if arch.head_norms:
            q, k, v = op.split(qkv, [arch.heads, arch.heads + arch.kv_heads], axis=2)
            qkv = op.concat([self.q_norm(q), self.k_norm(k), v], dim=2)
        qkv = cast(_rotate(qkv, table, arch), self.setting.dtype)
        out = cache.attention_with_fused_qkv(layer, qkv, arch.heads, sm_scale=arch.attention_scale)
        out = cast(op.reshape(out, (batch, tokens, arch.heads * arch.head)), self.setting.activations)
        return self.o_proj(out)


class MLP(nn.Module):  # type: ignore[misc]
    def __init__(self, arch: Architecture, setting: Setting) -> None:
        super().__init__()
        self.activation = arch.activation
        self.gate_up_proj = Linear(2 * arch.intermediate, arch.hidden, setting)
        self.down_proj = Linear(arch.hidden, arch.intermediate, setting)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
        gate = op.silu(gate) if self.activation == "silu" else op.gelu(gate, approximate="tanh")
        return self.down_proj(gate * up)


class Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, arch: Architecture, setting: Setting) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(arch, setting), MLP(arch, setting)
        self.sandwich = arch.sandwich_norms
        self.input_layernorm = Norm(arch.hidden, arch.epsilon, setting)
        self.post_attention_layernorm = Norm(arch.hidden, arch.epsilon, setting)
        if self.sandwich:
            self.pre_feedforward_layernorm = Norm(arch.hidden, arch.epsilon, setting)
            self.post_feedforward_layernorm = Norm(arch.hidden, arch.epsilon, setting)

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int, table: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cache, layer, table)
        if not self.sandwich:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Body(nn.Module):  # type: ignore[misc]
    def __init__(self, arch: Architecture, setting: Setting) -> None:
        super().__init__()
        self.embed_tokens = Weights(arch.vocabulary, arch.hidden, setting)
        self.layers = nn.ModuleList([Layer(arch, setting) for _ in range(arch.layers)])
        self.norm = Norm(arch.hidden, arch.epsilon, setting)


class Decoder(nn.Module):  # type: ignore[misc]
    """One method per function of the library.

    Shapes: embeddings (1, tokens, hidden), or (sequences, 1, hidden) where each sequence gets one token; logits
    (1, …, vocabulary) or (sequences, 1, vocabulary), float32. Which sequences the tokens belong to is known to the
    cache (`kv_state_begin_forward`).
    """

    def __init__(self, arch: Architecture, setting: Setting) -> None:
        super().__init__()
        self.arch, self.setting = arch, setting
        self.model = Body(arch, setting)
        self.lm_head = None if arch.tied else Weights(arch.vocabulary, arch.hidden, setting)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens.take(input_ids)

    def prefill(self, input_embed: Tensor, paged_kv_cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        def last(x: Any) -> Any:
            return te.compute(
                (x.shape[0], 1, x.shape[2]), lambda i, _, k: x[i, x.shape[1] - 1, k], name="last"
            )

        hidden = op.tensor_expr_op(last, "last", [self._hidden(input_embed, paged_kv_cache)])
        return self._logits(hidden), paged_kv_cache

    def decode(self, input_embed: Tensor, paged_kv_cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        return self._logits(self._hidden(input_embed, paged_kv_cache)), paged_kv_cache

    def batch_prefill(
        self, input_embeds: Tensor, logit_positions: Tensor, paged_kv_cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        hidden = self._hidden(input_embeds, paged_kv_cache)
        return self._logits(op.take(hidden, logit_positions, axis=1)), paged_kv_cache

    def batch_decode(self, input_embeds: Tensor, paged_kv_cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        return self._logits(self._hidden(input_embeds, paged_kv_cache)), paged_kv_cache

    def batch_verify(self, input_embeds: Tensor, paged_kv_cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        return self._logits(self._hidden(input_embeds, paged_kv_cache)), paged_kv_cache

    def create_tir_paged_kv_cache(
        self, max_batch_size: Any, max_total_seq_len: Any, prefill_chunk_size: Any, page_size: Any,
        support_sliding_window: Any,
    ) -> PagedKVCache:  # fmt: skip
        sizes = (max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window)
        return create_cache(self.arch, self.setting, *sizes)

    def specification(self) -> Any:
        """The functions with the types of their arguments, for `export_tvm`."""
        weights = {"$": {"param_mode": "packed", "effect_mode": "none"}}
        alone = {"$": {"param_mode": "none", "effect_mode": "none"}}
        hidden, dtype = self.arch.hidden, self.setting.dtype
        cache = {"paged_kv_cache": spec.Object(object_type=PagedKVCache)}
        some = spec.Tensor([1, "seq_len", hidden], dtype)
        functions = {
            "embed": {"input_ids": spec.Tensor(["seq_len"], "int32")} | weights,
            "prefill": {"input_embed": some} | cache | weights,
            "decode": {"input_embed": spec.Tensor([1, 1, hidden], dtype)} | cache | weights,
            "batch_prefill": {"input_embeds": some, "logit_positions": spec.Tensor(["batch_size"], "int32")}
            | cache
            | weights,
            "batch_decode": {"input_embeds": spec.Tensor(["batch_size", 1, hidden], dtype)} | cache | weights,
            "batch_verify": {"input_embeds": some} | cache | weights,
            "create_tir_paged_kv_cache": dict.fromkeys(_CACHE_SIZES, int) | alone,
        }
        return spec.ModuleSpec.from_raw(functions, self)

    def _hidden(self, embeddings: Tensor, cache: PagedKVCache) -> Tensor:
        batch, tokens, _ = embeddings.shape
        x = cast(embeddings, self.setting.activations)
        if self.arch.embedding_scale != 1.0:
            x = x * self.arch.embedding_scale
        positions = cache.get_query_positions(batch * tokens)
        tables = {rope: _table(rope, positions) for rope in dict.fromkeys(self.arch.ropes)}
        for number, (layer, rope) in enumerate(zip(self.model.layers, self.arch.ropes, strict=True)):
            x = layer(x, cache, number, tables[rope])
        return self.model.norm(x)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        logits = head.product(hidden, "float32")
        if cap := self.arch.final_softcap:
            logits = op.tanh(logits / cap) * cap
        return logits


def _table(rope: Rope, positions: Tensor) -> Tensor:
    """Cosines and sines, (2, tokens, rotated pairs) float32: once for all layers."""
    frequencies = Tensor(_expr=relax.const(np.array(rope.frequencies, np.float32)))

    def both(at: Any, frequency: Any) -> Any:
        def element(kind: Any, t: Any, i: Any) -> Any:
            angle = at[t].astype("float32") * frequency[i]
            return tirx.Select(kind == 0, tirx.cos(angle), tirx.sin(angle)) * tirx.const(
                rope.factor, "float32"
            )

        return te.compute((2, at.shape[0], frequency.shape[0]), element, name="rope_table")

    return op.tensor_expr_op(both, "rope_table", [positions, frequencies])


def _rotate(qkv: Tensor, table: Tensor, arch: Architecture) -> Tensor:
    """Rotate queries and keys. An element's partner is half the rotated width away."""
    pairs = int(table.shape[2])
    rotated = arch.heads + arch.kv_heads

    def rotation(x: Any, angles: Any) -> Any:
        tokens_each = x.shape[1]

        def element(b: Any, t: Any, h: Any, d: Any) -> Any:
            value = x[b, t, h, d].astype("float32")
            at, i = b * tokens_each + t, d % pairs
            other = tirx.if_then_else(d < pairs, -x[b, t, h, d + pairs], x[b, t, h, d - pairs]).astype(
                "float32"
            )
            turned = value * angles[0, at, i] + other * angles[1, at, i]
            return tirx.if_then_else(tirx.And(h < rotated, d < 2 * pairs), turned, value).astype(x.dtype)

        return te.compute(x.shape, element, name="rotate")

    return op.tensor_expr_op(rotation, "rotate", [qkv, table])
