"""What the CPU kernels share: vectors of 16 floats, whatever the width of the machine's registers."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

LANES = 16  # one AVX-512 register, two of AVX2, four of NEON
LOG2_E = 1.4426950408889634
# 2^x on [0, 1], lowest power first: least squares of the relative error on Chebyshev nodes, 1.6e-7 at most.
_EXP2 = (
    0.9999999269249815, 0.693152968176632, 0.2401545298867277, 0.0558236044622624, 0.008992584031377331,
    0.0018762329451683987,
)  # fmt: skip


def lanes(start: Any, count: int = LANES) -> Any:
    """The index of `count` neighbouring elements."""
    return T.Ramp(start, 1, count)


def total(vector: Any, count: int = LANES) -> Any:
    """The sum of a vector's lanes, as a tree: a chain of additions would wait for each one's result."""
    while count > 1:
        count //= 2
        low, high = list(range(count)), list(range(count, 2 * count))
        vector = T.Shuffle([vector], low) + T.Shuffle([vector], high)
    return vector


def greatest(vector: Any, count: int = LANES) -> Any:
    """The maximum of a vector's lanes."""
    while count > 1:
        count //= 2
        low, high = list(range(count)), list(range(count, 2 * count))
        vector = T.max(T.Shuffle([vector], low), T.Shuffle([vector], high))
    return vector


def spread(vector: Any, count: int, times: int) -> Any:
    """Each of the `count` lanes, `times` times over: (a, b) becomes (a, a, b, b)."""
    return T.Shuffle([vector] * times, [lane // times for lane in range(count * times)])


def exp2(x: Any) -> Any:
    """2^x for x of at most 127, one float; relative error below 2e-7.

    The C library's one takes a call per lane. A polynomial for the fraction, the exponent's bits for the rest.
    """
    x = T.max(x, T.float32(-126.0))
    whole = T.floor(x)
    fraction = x - whole
    power = T.float32(_EXP2[-1])
    for coefficient in _EXP2[-2::-1]:
        power = power * fraction + T.float32(coefficient)
    bits = T.shift_left(T.Cast("int32", whole) + T.int32(127), T.int32(23))
    return power * T.reinterpret("float32", bits)
