"""The paged KV cache that a library creates: tvm's, with our attention kernels on a CPU."""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode, TIRPagedKVCache

from alight.errors import Unsupported
from alight_converters.compile_mlc.architecture import Architecture
from alight_converters.compile_mlc.kernels.attention import attention_kernels
from alight_converters.compile_mlc.layers import Setting


def create_cache(
    arch: Architecture,
    setting: Setting,
    max_batch_size: Any,
    max_total_seq_len: Any,
    prefill_chunk_size: Any,
    page_size: Any,
    support_sliding_window: Any,
) -> TIRPagedKVCache:
    """See `TIRPagedKVCache`. It does not rotate: the decoder has done that, each family in its way."""
    if arch.attention_softcap and not setting.cpu:
        raise Unsupported(
            f"{arch.model_type} limits its attention scores, which tvm's GPU kernels do not",
            hint="Compile it for a CPU, or use another format.",
        )
    return TIRPagedKVCache(
        attn_kind=["mha" if window is None else "mha_sliding" for window in arch.windows],
        max_batch_size=max_batch_size,
        max_total_seq_len=max_total_seq_len,
        prefill_chunk_size=prefill_chunk_size,
        page_size=page_size,
        support_sliding_window=support_sliding_window,
        layer_partition=relax.ShapeExpr([0, arch.layers]),
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        qk_head_dim=arch.head,
        v_head_dim=arch.head,
        mla_original_qk_head_dim=0,
        mla_original_v_head_dim=0,
        rope_mode=RopeMode.NONE,
        rope_scale=1,
        rope_theta=10000,
        rope_scaling={},
        rope_ext_factors=relax.prim_value(0),
        rotary_dim=arch.head,
        enable_disaggregation=False,
        dtype=setting.dtype,
        target=setting.target,
        layer_sliding_window_size=arch.window or 1024,
    )


def with_our_attention(module: Any, arch: Architecture, dtype: str) -> Any:
    """A CPU library's module with our kernels in place of tvm's, which take one number at a time."""
    kernels = attention_kernels(
        arch.heads,
        arch.kv_heads,
        arch.head,
        dtype,
        softcap=arch.attention_softcap,
        window=arch.window or 1024,
    )
    for name, kernel in kernels.items():
        place = module.get_global_var(name)
        module.update_func(place, kernel.with_attr("global_symbol", name))
    return module
