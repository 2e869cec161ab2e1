"""Streams of text: whole characters, and never half a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from alight.text import TextStream


def show(data: bytes, sizes: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    shown = []
    at = 0
    for size in sizes:
        shown.append(stream.feed(data[at : at + size]))
        at += size
    shown.append(stream.feed(data[at:]))
    shown.append(stream.finish())
    return shown, stream.stopped


def test_a_character_waits_for_its_last_byte() -> None:
    stream = TextStream()
    assert [stream.feed(bytes([b])) for b in "é👍".encode()] == ["", "é", "", "", "", "👍"]


def test_stop_inside_a_piece_cuts_it() -> None:
    assert show(b"one STOP two", [], ("STOP",)) == (["one ", ""], True)


def test_what_looks_like_a_stop_is_shown_when_it_is_none() -> None:
    assert "".join(show(b"a STO b", [3, 1, 1], ("STOP",))[0]) == "a STO b"


def test_the_earliest_of_several_stops_wins() -> None:
    assert show(b"x bb aa", [], ("aa", "bb")) == (["x ", ""], True)


@given(
    st.text("abS T", max_size=30),
    st.lists(st.integers(0, 5), max_size=12),
    st.lists(st.text("abST", min_size=1, max_size=3), max_size=3),
)
def test_pieces_do_not_matter(text: str, sizes: list[int], stops: list[str]) -> None:
    shown, stopped = show(text.encode(), sizes, tuple(stops))
    whole = "".join(shown)
    assert not any(s in whole for s in stops)
    assert text.startswith(whole)
    assert stopped == any(s in text for s in stops)
    if not stopped:
        assert whole == text
