"""The radix tree, against a list of all sequences."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from alight_targets.llama_cpp.prefix import PrefixIndex

sequences = st.lists(st.integers(0, 2), max_size=8)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(st.lists(st.tuples(st.integers(0, 4), st.one_of(st.none(), sequences)), max_size=20), sequences)
def test_it_finds_what_a_full_search_finds(
    steps: list[tuple[int, list[int] | None]], wanted: list[int]
) -> None:
    index, held = PrefixIndex(), dict[int, list[int]]()
    for owner, tokens in steps:
        if tokens is None:
            index.remove(owner)
            held.pop(owner, None)
        else:
            index.insert(owner, tokens)
            held[owner] = tokens
    owner, length = index.longest(wanted)
    assert length == max((common(wanted, t) for t in held.values()), default=0)
    if length:
        assert common(wanted, held[owner]) == length
    for known, tokens in held.items():
        assert index.tokens(known) == tokens


def test_a_growing_conversation_is_one_path() -> None:
    index = PrefixIndex()
    index.insert(1, [1, 2, 3])
    index.insert(1, [1, 2, 3, 4, 5])
    index.insert(2, [1, 2, 9])
    assert index.longest([1, 2, 3, 4, 5, 6]) == (1, 5)
    assert index.longest([1, 2, 9, 9]) == (2, 3)
    index.remove(1)
    assert index.longest([1, 2, 3, 4]) == (2, 2)
    index.remove(2)
    assert index.longest([1]) == (-1, 0)
