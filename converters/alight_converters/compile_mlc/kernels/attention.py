"""Attention on a CPU, under the signatures by which tvm's paged KV cache calls its kernels.

Each pair of a token and a head is one unit of work. It walks over the keys in steps of 16 and keeps a running maximum
and sum (online softmax: Milakov and Gimelshein, arXiv:1805.02867). Queries and keys arrive already rotated.
"""
# ruff: noqa: ARG001  # the signatures are tvm's

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from alight_converters.compile_mlc.kernels.vector import LANES, LOG2_E, exp2, greatest, lanes, total

PAGE = 16  # tokens in a page of the cache
_STEP = LANES  # keys taken at a time
_EMPTY = -5e4  # the log-sum of no keys; tvm's kernels use it as well
_MAXIMUM, _SUM, _NEW, _SHRINK = range(4)  # of a unit's running state


def attention_kernels(
    heads: int, kv_heads: int, width: int, dtype: str, *, softcap: float, window: int
) -> dict[str, Any]:
    """The kernels by the names that `TIRPagedKVCache` gives its own.

    Args:
        width: of a head; a multiple of 16. softcap: of the scores; 0 is off. window: of the layers that have one.
    """
    sizes = (heads, kv_heads, width, dtype, softcap)
    return {
        "batch_prefill_ragged_kv": _ragged_prefill(*sizes),
        "batch_prefill_paged_kv_cpu": _paged_prefill(*sizes, window=None),
        "batch_prefill_paged_kv_cpu_sliding_window": _paged_prefill(*sizes, window=window),
        "batch_decode_paged_kv_cpu": _paged_decode(*sizes, windowed=False),
        "batch_decode_paged_kv_cpu_sliding_window": _paged_decode(*sizes, windowed=True),
    }


def _in_bits(score: Any, softcap: float) -> Any:
    """A score as a power of two; before that, softly limited."""
    if softcap:
        score = T.tanh(score / T.float32(softcap)) * T.float32(softcap)
    return score * T.float32(LOG2_E)


def _paged(pages: Any, table: Any, begin: Any, offset: Any, kind: int, head: Any) -> Any:
    """Key (kind 0) or value (1) of a row of a sequence: (row, element) -> number. `offset` rows of its first page
    are left out."""
    return lambda row, d: pages[table[begin + (row + offset) // PAGE], kind, head, (row + offset) % PAGE, d]


def _ragged(data: Any, begin: Any, head: Any) -> Any:
    return lambda row, d: data[begin + row, head, d]


@T.inline
def _attend(key, value, first, last, query, out, scores, products, state, scale, softcap, width):  # type: ignore[no-untyped-def]
    """Weigh the values of rows first…last-1 by the query's products with their keys; `out` is not yet divided."""
    state[_MAXIMUM] = T.float32(_EMPTY)
    state[_SUM] = T.float32(0)
    out[lanes(0, width)] = T.Broadcast(T.float32(0), width)
    for step in T.serial((last - first + _STEP - 1) // _STEP):
        for j in T.serial(_STEP):
            if first + step * _STEP + j < last:
                products[lanes(0)] = T.Broadcast(T.float32(0), LANES)
                for c in T.unroll(width // LANES):
                    for v in T.vectorized(LANES):
                        products[v] += query[c * LANES + v] * T.Cast(
                            "float32", key(first + step * _STEP + j, c * LANES + v)
                        )
                scores[j] = _in_bits(total(products[lanes(0)]) * scale, softcap)
            else:
                scores[j] = T.float32(2 * _EMPTY)
        state[_NEW] = T.max(state[_MAXIMUM], greatest(scores[lanes(0)]))
        state[_SHRINK] = exp2(state[_MAXIMUM] - state[_NEW])
        for v in T.vectorized(_STEP):
            scores[v] = T.Select(scores[v] > T.float32(_EMPTY), exp2(scores[v] - state[_NEW]), T.float32(0))
        state[_SUM] = state[_SUM] * state[_SHRINK] + total(scores[lanes(0)])
        state[_MAXIMUM] = state[_NEW]
        for d in T.vectorized(width):
            out[d] *= state[_SHRINK]
        for j in T.serial(T.min(_STEP, last - first - step * _STEP)):
            for d in T.vectorized(width):
                out[d] += scores[j] * T.Cast("float32", value(first + step * _STEP + j, d))


@T.inline
def _store(output, lse, t, h, out, state, dtype, width):  # type: ignore[no-untyped-def]
    for d in T.vectorized(width):
        output[t, h, d] = T.Cast(dtype, out[d] / T.max(state[_SUM], T.float32(1e-30)))
    lse[t, h] = T.if_then_else(
        state[_SUM] > T.float32(0), state[_MAXIMUM] + T.log2(state[_SUM]), T.float32(_EMPTY)
    )


def _ragged_prefill(heads: int, kv_heads: int, width: int, dtype: str, softcap: float) -> Any:
    """Within what a prefill appends, each sequence for itself."""

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def ragged_prefill(  # type: ignore[no-untyped-def]
        q_: T.handle, q_starts_: T.handle, k_: T.handle, v_: T.handle, kv_starts_: T.handle,
        q_positions_: T.handle, k_offsets_: T.handle, output_: T.handle, lse_: T.handle,
        causal: T.int32, rotary_mode: T.int32, rope_scale: T.float32, rope_theta: T.float32, scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch, tokens, rows = T.int32(), T.int32(), T.int32()
        q_from, kv_from, offsets_from = T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_, (tokens, heads, width), dtype)
        q_starts = T.match_buffer(q_starts_, (batch + 1,), "int32", elem_offset=q_from)
        k = T.match_buffer(k_, (rows, kv_heads, width), dtype)
        v = T.match_buffer(v_, (rows, kv_heads, width), dtype)
        kv_starts = T.match_buffer(kv_starts_, (batch + 1,), "int32", elem_offset=kv_from)
        T.match_buffer(
            k_offsets_, (batch,), "int32", elem_offset=offsets_from
        )  # tells the number of sequences
        output = T.match_buffer(output_, (tokens, heads, width), dtype)
        lse = T.match_buffer(lse_, (tokens, heads), "float32")
        for unit in T.parallel(tokens * heads):
            with T.sblock("attend"):
                query = T.sblock_alloc_buffer((width,), "float32")
                out = T.sblock_alloc_buffer((width,), "float32")
                scores = T.sblock_alloc_buffer((_STEP,), "float32")
                products = T.sblock_alloc_buffer((LANES,), "float32")
                state = T.sblock_alloc_buffer((4,), "float32")
                t: T.let[T.int32] = unit // heads
                h: T.let[T.int32] = unit % heads
                for d in T.vectorized(width):
                    query[d] = T.Cast("float32", q[t, h, d])
                for b in T.serial(batch):
                    if q_starts[b] <= t and t < q_starts[b + 1]:
                        length: T.let[T.int32] = kv_starts[b + 1] - kv_starts[b]
                        seen: T.let[T.int32] = T.if_then_else(
                            causal > 0, length - (q_starts[b + 1] - q_starts[b]) + t - q_starts[b] + 1, length
                        )
                        _attend(
                            _ragged(k, kv_starts[b], h // (heads // kv_heads)),
                            _ragged(v, kv_starts[b], h // (heads // kv_heads)),
                            0, seen, query, out, scores, products, state, scale, softcap, width,
                        )  # fmt: skip
                        _store(output, lse, t, h, out, state, dtype, width)

    return ragged_prefill


def _length(windowed: bool, info: Any, b: Any, pages: Any) -> Any:
    """Rows of a sequence that a layer sees. With a window, `info` is (rows in the last page, rows of the first page
    that are left out, 0); without, rows in the last page."""
    in_last_page = info[0, b] - info[1, b] if windowed else info[b]
    return T.if_then_else(pages > 0, (pages - 1) * PAGE + in_last_page, 0)


def _left_out(windowed: bool, info: Any, b: Any) -> Any:
    return info[1, b] if windowed else 0


def _paged_prefill(
    heads: int, kv_heads: int, width: int, dtype: str, softcap: float, *, window: int | None
) -> Any:
    """What a prefill's tokens see of the cache. With a window, only what is less than `window` tokens back."""
    windowed = window is not None

    def first_seen(causal: Any, length: Any, row: Any) -> Any:
        if window is None:
            return 0
        return T.if_then_else(causal > 0, T.max(length - T.max(window - row - 1, 0), 0), 0)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def paged_prefill(  # type: ignore[no-untyped-def]
        q_: T.handle, q_starts_: T.handle, pages_: T.handle, starts_: T.handle, table_: T.handle, info_: T.handle,
        k_offsets_: T.handle, q_positions_: T.handle, output_: T.handle, lse_: T.handle,
        causal: T.int32, rotary_mode: T.int32, rope_scale: T.float32, rope_theta: T.float32, scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch, tokens, entries, count = T.int32(), T.int32(), T.int32(), T.int32()
        q_from, starts_from, table_from, info_from = T.int32(), T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_, (tokens, heads, width), dtype)
        q_starts = T.match_buffer(q_starts_, (batch + 1,), "int32", elem_offset=q_from)
        pages = T.match_buffer(pages_, (count, 2, kv_heads, PAGE, width), dtype)
        starts = T.match_buffer(starts_, (batch + 1,), "int32", elem_offset=starts_from)
        table = T.match_buffer(table_, (entries,), "int32", elem_offset=table_from)
        info = T.match_buffer(info_, (3, batch) if windowed else (batch,), "int32", elem_offset=info_from)
        output = T.match_buffer(output_, (tokens, heads, width), dtype)
        lse = T.match_buffer(lse_, (tokens, heads), "float32")
        for unit in T.parallel(tokens * heads):
            with T.sblock("attend"):
                query = T.sblock_alloc_buffer((width,), "float32")
                out = T.sblock_alloc_buffer((width,), "float32")
                scores = T.sblock_alloc_buffer((_STEP,), "float32")
                products = T.sblock_alloc_buffer((LANES,), "float32")
                state = T.sblock_alloc_buffer((4,), "float32")
                t: T.let[T.int32] = unit // heads
                h: T.let[T.int32] = unit % heads
                for d in T.vectorized(width):
                    query[d] = T.Cast("float32", q[t, h, d])
                for b in T.serial(batch):
                    if q_starts[b] <= t and t < q_starts[b + 1]:
                        length: T.let[T.int32] = _length(windowed, info, b, starts[b + 1] - starts[b])
                        # Without a window the kernel is called only for what lies before all tokens, or, of a
                        # decode, for all that is there.
                        _attend(
                            _paged(pages, table, starts[b], _left_out(windowed, info, b), 0, h // (heads // kv_heads)),
                            _paged(pages, table, starts[b], _left_out(windowed, info, b), 1, h // (heads // kv_heads)),
                            first_seen(causal, length, t - q_starts[b]), length,
                            query, out, scores, products, state, scale, softcap, width,
                        )  # fmt: skip
                        _store(output, lse, t, h, out, state, dtype, width)

    return paged_prefill


def _paged_decode(
    heads: int, kv_heads: int, width: int, dtype: str, softcap: float, *, windowed: bool
) -> Any:
    """One token of each sequence, over the cache that holds it already."""

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def paged_decode(  # type: ignore[no-untyped-def]
        q_: T.handle, pages_: T.handle, starts_: T.handle, table_: T.handle, info_: T.handle,
        k_offsets_: T.handle, q_positions_: T.handle, output_: T.handle, lse_: T.handle,
        rotary_mode: T.int32, rope_scale: T.float32, rope_theta: T.float32, scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch, entries, count = T.int32(), T.int32(), T.int32()
        starts_from, table_from, info_from = T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_, (batch, heads, width), dtype)
        pages = T.match_buffer(pages_, (count, 2, kv_heads, PAGE, width), dtype)
        starts = T.match_buffer(starts_, (batch + 1,), "int32", elem_offset=starts_from)
        table = T.match_buffer(table_, (entries,), "int32", elem_offset=table_from)
        info = T.match_buffer(info_, (3, batch) if windowed else (batch,), "int32", elem_offset=info_from)
        output = T.match_buffer(output_, (batch, heads, width), dtype)
        lse = T.match_buffer(lse_, (batch, heads), "float32")
        for unit in T.parallel(batch * heads):
            with T.sblock("attend"):
                query = T.sblock_alloc_buffer((width,), "float32")
                out = T.sblock_alloc_buffer((width,), "float32")
                scores = T.sblock_alloc_buffer((_STEP,), "float32")
                products = T.sblock_alloc_buffer((LANES,), "float32")
                state = T.sblock_alloc_buffer((4,), "float32")
                b: T.let[T.int32] = unit // heads
                h: T.let[T.int32] = unit % heads
                for d in T.vectorized(width):
                    query[d] = T.Cast("float32", q[b, h, d])
                _attend(
                    _paged(pages, table, starts[b], _left_out(windowed, info, b), 0, h // (heads // kv_heads)),
                    _paged(pages, table, starts[b], _left_out(windowed, info, b), 1, h // (heads // kv_heads)),
                    0, _length(windowed, info, b, starts[b + 1] - starts[b]),
                    query, out, scores, products, state, scale, softcap, width,
                )  # fmt: skip
                _store(output, lse, b, h, out, state, dtype, width)

    return paged_decode
