"""x @ w.T on a CPU, for weights of 4, 16 or 32 bits. Arithmetic is float32, whatever the weights are stored in.

Four-bit weights are eight to a word, and 32 of a row share a scale. Sixteen words are taken at a time: shifted by
4 i and masked, their lanes hold the elements i, 8 + i, 16 + i, … of a block of 128. So the input is brought into that
order once, and no weight ever moves between lanes. One token (decoding) multiplies the numbers as they come; for
several, a few rows are unpacked and meet all tokens.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any

from tvm.script import tirx as T

from alight_converters.compile_mlc.kernels.vector import LANES, lanes, spread, total

GROUP = 32  # weights that share a scale
PER_WORD = 8
ZERO = 7  # what a stored 0…14 is counted from
_ROWS = 4  # rows of weights that are unpacked together


@cache
def linear4(rows: int, columns: int, scale_type: str) -> Any:
    """(x (m, columns) float32, words (rows, columns / 8), scales (rows, columns / 32)) -> y (m, rows) float32."""
    words = columns // PER_WORD
    blocks, rest = divmod(words, LANES)
    tail = blocks * LANES
    together = gcd(rows, _ROWS)

    def number(word: Any, i: Any) -> Any:
        digit = T.bitwise_and(T.shift_right(word, T.Cast("uint32", i * 4)), T.uint32(15))
        return T.Cast("float32", T.Cast("int32", digit))

    def scale(s: Any, n: Any, first: Any, count: int) -> Any:
        if count == 4:
            return T.Broadcast(T.Cast("float32", s[n, first // 4]), 4)
        groups = s[n, lanes(first // 4, count // 4)]
        return spread(T.Cast(f"float32x{count // 4}", groups), count // 4, 4)

    @T.inline
    def arrange(x, ordered, offset, t, first, count):  # type: ignore[no-untyped-def]
        """Bring a token's elements into the order of the lanes; the offset is -7 times their sum, lane by lane."""
        offset[t, lanes(first, count)] = T.Broadcast(T.float32(0), count)
        for i in T.serial(PER_WORD):
            for v in T.vectorized(count):
                ordered[t, first * PER_WORD + i * count + v] = x[t, first * PER_WORD + v * PER_WORD + i]
            for v in T.vectorized(count):
                offset[t, first + v] += T.float32(-ZERO) * ordered[t, first * PER_WORD + i * count + v]

    @T.inline
    def multiply(w, s, ordered, offset, part, sums, n, first, count):  # type: ignore[no-untyped-def]
        """Add the products of `count` words of row n with the one token."""
        part[lanes(0, count)] = offset[0, lanes(first, count)]
        for i in T.unroll(PER_WORD):
            for v in T.vectorized(count):
                part[v] += number(w[n, first + v], i) * ordered[0, first * PER_WORD + i * count + v]
        sums[lanes(0, count)] += part[lanes(0, count)] * scale(s, n, first, count)

    @T.inline
    def unpack(w, s, weights, n, r, first, count):  # type: ignore[no-untyped-def]
        """Write `count` words of row n as floats, in the order of the lanes."""
        for i in T.unroll(PER_WORD):
            for v in T.vectorized(count):
                weights[r, first * PER_WORD + i * count + v] = number(w[n, first + v], i) - T.float32(ZERO)
            weights[r, lanes(first * PER_WORD + i * count, count)] *= scale(s, n, first, count)

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def linear(x_: T.handle, w_: T.handle, s_: T.handle, y_: T.handle):  # type: ignore[no-untyped-def]
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_, (m, columns), "float32")
        w = T.match_buffer(w_, (rows, words), "uint32")
        s = T.match_buffer(s_, (rows, columns // GROUP), scale_type)
        y = T.match_buffer(y_, (m, rows), "float32")
        with T.sblock("linear"):
            ordered = T.sblock_alloc_buffer((m, columns), "float32")
            offset = T.sblock_alloc_buffer((m, words), "float32")
            for t in T.serial(m):
                for block in T.serial(blocks):
                    arrange(x, ordered, offset, t, block * LANES, LANES)
                if rest > 0:
                    arrange(x, ordered, offset, t, tail, rest)
            if m == 1:
                for n in T.parallel(rows):
                    with T.sblock("row"):
                        part = T.sblock_alloc_buffer((LANES,), "float32")
                        sums = T.sblock_alloc_buffer((LANES,), "float32")
                        sums[lanes(0)] = T.Broadcast(T.float32(0), LANES)
                        for block in T.serial(blocks):
                            multiply(w, s, ordered, offset, part, sums, n, block * LANES, LANES)
                        if rest > 0:
                            multiply(w, s, ordered, offset, part, sums, n, tail, rest)
                        y[0, n] = total(sums[lanes(0)])
            else:
                for group in T.parallel(rows // together):
                    with T.sblock("rows"):
                        weights = T.sblock_alloc_buffer((together, columns), "float32")
                        sums = T.sblock_alloc_buffer((together, LANES), "float32")
                        for r in T.serial(together):
                            for block in T.serial(blocks):
                                unpack(w, s, weights, group * together + r, r, block * LANES, LANES)
                            if rest > 0:
                                unpack(w, s, weights, group * together + r, r, tail, rest)
                        for t in T.serial(m):
                            products(weights, ordered, sums, t, together, columns)
                            for r in T.unroll(together):
                                y[t, group * together + r] = total(sums[r, lanes(0)])

    return linear


@T.inline
def products(weights, x, sums, t, together, columns):  # type: ignore[no-untyped-def]
    """The products of `together` rows of float32 weights with token t, lane by lane."""
    for r in T.unroll(together):
        sums[r, lanes(0)] = T.Broadcast(T.float32(0), LANES)
    for block in T.serial(columns // LANES):
        for r in T.unroll(together):
            for v in T.vectorized(LANES):
                sums[r, v] += weights[r, block * LANES + v] * x[t, block * LANES + v]
    if columns % LANES > 0:
        for r in T.unroll(together):
            for v in T.vectorized(columns % LANES):
                sums[r, v] += weights[r, columns // LANES * LANES + v] * x[t, columns // LANES * LANES + v]


@cache
def linear_float(rows: int, columns: int, weight_type: str) -> Any:
    """(x (m, columns) float32, w (rows, columns)) -> y (m, rows) float32."""
    together = gcd(rows, _ROWS)

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def linear(x_: T.handle, w_: T.handle, y_: T.handle):  # type: ignore[no-untyped-def]
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_, (m, columns), "float32")
        w = T.match_buffer(w_, (rows, columns), weight_type)
        y = T.match_buffer(y_, (m, rows), "float32")
        for group in T.parallel(rows // together):
            with T.sblock("rows"):
                weights = T.sblock_alloc_buffer((together, columns), "float32")
                sums = T.sblock_alloc_buffer((together, LANES), "float32")
                for r, c in T.grid(together, columns // LANES):
                    for v in T.vectorized(LANES):
                        weights[r, c * LANES + v] = T.Cast("float32", w[group * together + r, c * LANES + v])
                if columns % LANES > 0:
                    for r, v in T.grid(together, columns % LANES):
                        weights[r, columns // LANES * LANES + v] = T.Cast(
                            "float32", w[group * together + r, columns // LANES * LANES + v]
                        )
                for t in T.serial(m):
                    products(weights, x, sums, t, together, columns)
                    for r in T.unroll(together):
                        y[t, group * together + r] = total(sums[r, lanes(0)])

    return linear
