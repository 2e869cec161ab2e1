"""The KV cache changes its layout under requests, and no answer notices."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from test_engine import greedy, same_up_to_a_tie
from tiny_model import tiny_adapter, tiny_model

import alight
from alight.errors import EngineError
from alight.target import Completion, Model
from alight_targets.llama_cpp.layout import UNIFIED, Layouts
from alight_targets.llama_cpp.model import LlamaCppModel
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


@pytest.fixture(scope="module", params=["plain", "lookup and adapters"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    file = tiny_model(folder / "tiny.gguf", context=LONG)
    options: dict[str, object] = {"threads": 1, "context": LONG}
    if request.param != "plain":
        options["adapters"] = (("style", str(tiny_adapter(folder / "style.gguf"))),)
    guesses = 0 if request.param == "plain" else 4
    with (
        alight.load(file, slots=6, lookup=guesses, **options) as crowded,
        alight.load(file, slots=1, **options) as alone,
    ):
        yield Pair(crowded, alone, styles=((),) if not guesses else ((), (("style", 1.0),)))


@dataclass(frozen=True)
class Pair:
    """One model for all at once and one for each alone, and the sets of adapters that they can use."""

    crowded: Model
    alone: Model
    styles: tuple[tuple[tuple[str, float], ...], ...]


@dataclass(frozen=True)
class Ask:
    """One request; it may hang up after a few chunks."""

    prompt: list[int]
    count: int
    hangs_up: bool
    style: tuple[tuple[str, float], ...]


@pytest.mark.parametrize("seed", range(2))
def test_each_gets_what_it_gets_alone_in_every_layout(pair: Pair, seed: int) -> None:
    draw = random.Random(seed)
    shared = [draw.randrange(200) for _ in range(300)]
    first = []
    for _ in range(12):  # short ones, ones that outgrow their part, long ones; some go on from others
        start = shared[: draw.choice([0, 0, 40, 300])]
        own = [draw.randrange(200) for _ in range(draw.choice([3, 30, 200, 600]))]
        count, hangs_up = draw.choice([4, 40, 150]), draw.random() < 0.2
        first.append(Ask([*start, *own], count, hangs_up, draw.choice(pair.styles)))
    answers = answers_at_once(pair, first)
    # The next turns of the same conversations, from what is kept, parked or gone by now.
    turns = [
        replace(a, prompt=[*a.prompt, *said, 5, 6], count=12) for a, said in zip(first, answers, strict=True)
    ]
    answers_at_once(pair, turns)
    assert pair.crowded.metrics()["cache_moves_total"] > 0


def answers_at_once(pair: Pair, asks: list[Ask]) -> list[list[int]]:
    """The answers to all of them, each checked against what the other model says to it alone."""
    answers: list[list[int]] = [[] for _ in asks]
    failures: list[str] = []
    lock = threading.Lock()

    def ask(index: int) -> None:
        prompt, count, adapters = asks[index].prompt, asks[index].count, asks[index].style
        got = answers[index]
        stream = pair.crowded.generate(prompt, greedy(count, adapters=adapters))
        for number, chunk in enumerate(stream):
            got += chunk.tokens
            if asks[index].hangs_up and number == 3:
                stream.close()
                break
        with lock:
            sampling = greedy(len(got) or 1, logprobs=2, adapters=adapters)
            expected = Completion.of(pair.alone.generate(prompt, sampling))
            if not same_up_to_a_tie(got, expected):
                failures.append(f"{len(prompt)} tokens: {got} instead of {expected.tokens}")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asks))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    return answers


def test_without_memory_for_a_layout_those_who_run_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_model(tmp_path / "tiny.gguf", context=LONG)
    with alight.load(file, threads=1, context=LONG, slots=6) as model:
        assert isinstance(model, LlamaCppModel)
        opened = model._open_context

        def refusing(context: int, *, sequences: int, outputs: int, unified: bool = True) -> NativeContext:
            if unified:
                raise EngineError("no memory")
            return opened(context, sequences=sequences, outputs=outputs, unified=unified)

        expected = [Completion.of(model.generate([i, 7], greedy(200))).tokens for i in range(2)]
        monkeypatch.setattr(model, "_open_context", refusing)
        running = model.generate([0, 7], greedy(200))
        got = [*next(running).tokens]
        long = model.generate([5] * (LONG - 100), greedy(3))  # only the unified cache could hold it
        failed: list[Exception] = []

        def ask() -> None:
            try:
                list(long)
            except EngineError as error:
                failed.append(error)

        waiting = threading.Thread(target=ask)
        waiting.start()
        got += [token for chunk in running for token in chunk.tokens]
        waiting.join()
        assert tuple(got) == expected[0]
        assert "no memory" in str(failed[0])
        monkeypatch.undo()
        assert Completion.of(model.generate([1, 7], greedy(200))).tokens == expected[1]
