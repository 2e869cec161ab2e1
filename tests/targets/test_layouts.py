"""The KV cache changes its layout under requests, and no answer notices."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_engine import greedy, same_up_to_a_tie
from tiny_model import tiny_model

import alight
from alight.target import Completion, Model
from alight_targets.llama_cpp.layout import UNIFIED, Layouts
from alight_targets.llama_cpp.native import NativeContext, NativeModel
from alight_targets.llama_cpp.state import NotConvertible, with_streams

LONG = 2048


def test_as_many_streams_as_are_large_enough() -> None:
    layouts = Layouts(cells=8192, sequences=48)
    assert layouts.best([100]) == 32
    assert layouts.best([100] * 32) == 32
    assert layouts.best([300]) == 16
    assert layouts.best([8192]) == UNIFIED
    assert layouts.best([600] * 9) == UNIFIED, "nine do not fit into eight parts"
    assert Layouts(cells=768, sequences=8).best([10]) == UNIFIED, "a part is a whole number of pages"
    assert Layouts(cells=8192, sequences=48, fixed=True).best([1]) == UNIFIED


def test_a_layout_suits_what_fits_into_its_parts() -> None:
    layouts = Layouts(cells=8192, sequences=48)
    assert layouts.suits(8, [1024] * 8)
    assert not layouts.suits(8, [1025])
    assert not layouts.suits(8, [1] * 9)
    assert layouts.suits(UNIFIED, [8192] * 20)


@pytest.mark.parametrize("flash", [True, False])
def test_a_state_fits_any_number_of_streams(tmp_path: Path, flash: bool) -> None:
    model = NativeModel([tiny_model(tmp_path / "tiny.gguf", context=LONG)])

    def context(streams: int) -> NativeContext:
        return NativeContext(
            model, context=LONG, batch=512, outputs=8, threads=1, sequences=max(streams, 3),
            unified=streams == UNIFIED, flash_attention=flash,
        )  # fmt: skip

    tokens = list(range(90))
    wanted = [False] * 89 + [True]
    source = context(4)
    source.decode(tokens, range(90), [2] * 90, wanted)
    state = source.state(2)
    source.decode([7], [90], [2], [True])
    expected = source.logits(0).copy()
    for streams in (UNIFIED, 8, 4):
        target = context(streams)
        assert target.set_state(1, with_streams(state, streams))
        target.decode([7], [90], [1], [True])
        assert np.array_equal(target.logits(0), expected)
        target.close()
    with pytest.raises(NotConvertible):
        with_streams(state[: len(state) // 2], 2)
    source.close()
    model.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Model]]:
    file = tiny_model(tmp_path_factory.mktemp("pair") / "tiny.gguf", context=LONG)
    with (
        alight.load(file, threads=1, context=LONG, slots=6) as crowded,
        alight.load(file, threads=1, context=LONG, slots=1) as alone,
    ):
        yield crowded, alone


@pytest.mark.parametrize("seed", range(2))
def test_each_gets_what_it_gets_alone_in_every_layout(pair: tuple[Model, Model], seed: int) -> None:
    crowded, alone = pair
    draw = random.Random(seed)
    moves = crowded.metrics()["cache_moves_total"]
    shared = [draw.randrange(200) for _ in range(300)]
    requests = []
    for _ in range(12):  # short ones, ones that outgrow their part, long ones; some go on from others
        start = shared[: draw.choice([0, 0, 40, 300])]
        own = [draw.randrange(200) for _ in range(draw.choice([3, 30, 200, 600]))]
        requests.append(([*start, *own], draw.choice([4, 40, 150]), draw.random() < 0.2))
    failures: list[str] = []
    lock = threading.Lock()

    def ask(prompt: list[int], count: int, hangs_up: bool) -> None:
        got: list[int] = []
        stream = crowded.generate(prompt, greedy(count))
        for number, chunk in enumerate(stream):
            got += chunk.tokens
            if hangs_up and number == 3:
                stream.close()
                break
        with lock:
            expected = Completion.of(alone.generate(prompt, greedy(len(got) or 1, logprobs=2)))
            if not same_up_to_a_tie(got, expected):
                failures.append(f"{len(prompt)} tokens: {got} instead of {expected.tokens}")

    threads = [threading.Thread(target=ask, args=r) for r in requests]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert crowded.metrics()["cache_moves_total"] > moves
