"""Batching over a Backend: what each request gets does not depend on what else runs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alight.artifact import Artifact, Description
from alight.errors import BadInput, ContextExceeded, EngineError, Unsupported
from alight.target import Availability, Completion, LoadOptions, Model, Sampling, Target
from alight.testing import check_target
from alight_targets.common.model import BatchedModel

Load = Callable[..., tuple[BatchedModel, tiny_backend.TinyBackend]]

ENDLESS = 10**9  # tokens


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Load the tiny model with some options; all are closed at the end."""
    loaded: list[Model] = []

    def with_options(**options: object) -> tuple[BatchedModel, tiny_backend.TinyBackend]:
        made = tiny_backend.load(tmp_path / "tiny", **options)
        loaded.append(made[0])
        return made

    yield with_options
    for model in loaded:
        model.close()


def greedy(count: int, **more: object) -> Sampling:
    return Sampling.of(max_tokens=count, temperature=0, ignore_eos=True, **more)


def answer(model: Model, prompt: str | list[int], sampling: Sampling) -> Completion:
    return Completion.of(model.generate(prompt, sampling))


def test_it_conforms(tmp_path: Path) -> None:
    class TinyTarget(Target):
        name, formats = "tiny", frozenset({"tiny"})

        def probe(self) -> Availability:
            return Availability(True, "")

        def load(self, artifact: Artifact, options: LoadOptions) -> Model:
            return tiny_backend.load(tmp_path / "tiny", context=options.context, slots=4)[0]

    check_target(TinyTarget(), Artifact("tiny", "", Description("tiny"), (), {}))


# -- each request gets what it gets alone ------------------------------------------------------------


@pytest.fixture(scope="module", params=[tiny_backend.TinyBackend, tiny_backend.ForkingBackend])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, Model]]:
    """One model with fewer slots than requests, and one that serves one request at a time without any reuse."""
    folder = tmp_path_factory.mktemp("pair")
    crowded, _ = tiny_backend.load(folder, request.param, slots=3)
    alone, _ = tiny_backend.load(folder, slots=1)
    with crowded, alone:
        yield crowded, alone


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(2, 4), min_size=1, max_size=40),  # few different tokens: much is shared
            st.integers(1, 20),  # tokens to make
            st.integers(0, 25),  # cancelled after so many chunks
            st.sampled_from([0.0, 1.0]),  # temperature
        ),
        min_size=1,
        max_size=8,
    )
)
def test_each_gets_what_it_gets_alone(
    pair: tuple[Model, Model], requests: list[tuple[list[int], int, int, float]]
) -> None:
    crowded, alone = pair
    failures: list[str] = []
    lock = threading.Lock()

    def ask(prompt: list[int], count: int, patience: int, temperature: float) -> None:
        sampling = Sampling(max_tokens=count, temperature=temperature, seed=7, ignore_eos=True)
        got: list[int] = []
        stream = crowded.generate(prompt, sampling)
        for n, chunk in enumerate(stream):
            got += chunk.tokens
            if n == patience:
                stream.close()
                break
        with lock:
            expected = answer(alone, prompt, sampling).tokens
            if tuple(got) != expected[: len(got)] or (len(got) < len(expected) and patience > 100):
                failures.append(f"{prompt}: {got} instead of {expected}")

    threads = [threading.Thread(target=ask, args=r) for r in requests]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert crowded.metrics()["running"] <= 3


def test_running_requests_are_decoded_together(load: Load) -> None:
    model, backend = load(slots=3)
    streams = [model.generate([5, 6, n], greedy(30)) for n in range(3)]
    threads = [threading.Thread(target=lambda s=s: list(s)) for s in streams]
    backend.gate.clear()
    for t in threads:
        t.start()
    while sum(model.metrics()[name] for name in ("waiting", "running")) < 3:
        time.sleep(0.001)
    backend.gate.set()
    for t in threads:
        t.join()
    assert backend.batches.count(3) >= 25


def test_a_long_prompt_is_read_between_the_steps_of_others(load: Load) -> None:
    model, backend = load(context=1024, slots=2, shift=True)
    first = model.generate([5], greedy(ENDLESS))
    next(first)
    assert answer(model, [6, 7] * 200, greedy(1)).usage.prompt_tokens == 400
    first.close()
    # (What is longer is the first one's, which fills its context again and again.)
    assert [count for count in backend.read[1:] if count <= 96] == [96, 96, 96, 96, 16]


# -- sequences are used again ------------------------------------------------------------------------


def test_the_next_turn_reads_only_what_is_new(load: Load) -> None:
    model, backend = load()
    first = answer(model, [5] * 20, greedy(6))
    turn = [*[5] * 20, *first.tokens, 9, 9]
    second = answer(model, turn, greedy(6))
    assert second.usage.cached_tokens == 25  # all but the last token of the answer
    assert backend.read == [20, 3]
    fresh, _ = load()
    assert answer(fresh, turn, greedy(6)).tokens == second.tokens
    assert model.metrics()["cached_tokens_total"] == 25


def test_the_same_prompt_again_computes_one_token(load: Load) -> None:
    model, backend = load()
    prompt = [5, 6, 7] * 5
    assert answer(model, prompt, greedy(4)).tokens == answer(model, prompt, greedy(4)).tokens
    assert backend.read == [15, 1]


def test_a_common_beginning_is_copied_where_the_backend_can(load: Load) -> None:
    model, backend = load(kind=tiny_backend.ForkingBackend, context=128)
    system = [5 + n % 7 for n in range(40)]
    answer(model, [*system, *range(50, 110)], greedy(2))
    other = answer(model, [*system, 9, 9], greedy(2))
    assert other.usage.cached_tokens == 40
    assert isinstance(backend, tiny_backend.ForkingBackend) and backend.forked == 1
    again = answer(model, [*system, *range(50, 110)], greedy(2))
    assert again.usage.cached_tokens == 99, "the longer one is still there"


def test_the_least_recently_used_sequence_goes_first(load: Load) -> None:
    model, _ = load(slots=1)  # and two more are kept
    for token in (5, 6, 7, 8):
        answer(model, [token] * 10, greedy(1))
    assert model.metrics()["evictions_total"] == 1
    assert answer(model, [6] * 10, greedy(1)).usage.cached_tokens == 9
    assert answer(model, [5] * 10, greedy(1)).usage.cached_tokens == 0


def test_metrics_count_the_cache(load: Load) -> None:
    model, _ = load(slots=2)
    assert model.metrics()["kv_cells"] == 64 * 4
    answer(model, [5] * 10, greedy(3))
    assert model.metrics()["kv_cells_used"] == 12
    before = model.progress()
    model.score([5, 6, 7])
    assert model.progress() > before


# -- ends and limits ---------------------------------------------------------------------------------


def test_cancelled_requests_make_room(load: Load) -> None:
    model, _ = load(slots=1, shift=True)
    first = model.generate([5], greedy(ENDLESS))
    next(first)
    first.close()
    assert answer(model, [6], greedy(3)).usage.completion_tokens == 3
    assert model.metrics()["running"] == 0


def test_shift_goes_on_where_the_context_ends(load: Load) -> None:
    ends = answer(load()[0], [5] * 40, greedy(100))
    assert (ends.finish_reason, ends.usage.completion_tokens) == ("length", 24)
    goes_on = answer(load(shift=True)[0], [5] * 40, greedy(100))
    assert goes_on.usage.completion_tokens == 100
    assert goes_on.tokens[:24] == ends.tokens


def test_too_long_a_prompt_has_the_numbers(load: Load) -> None:
    model, _ = load()
    with pytest.raises(ContextExceeded, match="needs 65 tokens but the context holds 64"):
        model.generate([5] * 64)
    with pytest.raises(ContextExceeded):
        model.score([5] * 65)
    assert len(model.score([5] * 64).logprobs) == 63


def test_score_is_the_teacher_forced_log_softmax(load: Load) -> None:
    model, _ = load()
    tokens = [5, 6, 7, 8, 9, 10, 11, 5, 6, 7, 8, 9]
    scores = model.score(tokens, distribution=True)
    asked = model.complete(tokens[:7], temperature=0, max_tokens=1, logprobs=3).logprobs[0]
    assert scores.distribution is not None
    assert asked.logprob == pytest.approx(scores.distribution[6, asked.token], abs=1e-5)
    assert [t for t, _, _ in asked.top] == np.argsort(-scores.distribution[6])[:3].tolist()


def test_a_failing_backend_fails_its_requests_and_no_others(load: Load) -> None:
    model, _ = load(fail_at=77)
    expected = answer(model, [5, 6], greedy(4)).tokens
    with pytest.raises(EngineError, match="the device is gone"):
        answer(model, [5, 77], greedy(4))
    assert answer(model, [5, 6], greedy(4)).tokens == expected
    assert model.metrics()["running"] == 0


def test_closing_ends_what_runs(load: Load) -> None:
    model, backend = load(shift=True)
    stream = model.generate([5], greedy(ENDLESS))
    next(stream)
    model.close()
    assert backend.closed
    with pytest.raises(EngineError, match="closed"):
        list(stream)
    with pytest.raises(EngineError, match="closed"):
        model.score([5, 6])


def test_a_waiting_consumer_can_leave(load: Load) -> None:
    model, _ = load(slots=1, shift=True)
    first = model.generate([5], greedy(ENDLESS))
    next(first)
    second = model.generate([6], greedy(3))
    assert next(second).tokens == (), "a sign of life"
    second.close()
    while model.metrics()["waiting"]:
        next(first)
    first.close()


@pytest.mark.parametrize(
    "options",
    [{"lookup": 4}, {"draft": "x.gguf"}, {"kv_type": "q8_0"}, {"prompt_cache": "x"}, {"projector": "x"}],
)
def test_what_a_backend_cannot_is_refused(load: Load, options: dict[str, object]) -> None:
    with pytest.raises(Unsupported, match=f"has no {next(iter(options))}"):
        load(**options)


def test_adapters_and_images_are_refused(load: Load) -> None:
    model, _ = load(adapters=(("style", "style.onnx_adapter"),))
    with pytest.raises(BadInput, match="no adapter 'x' is loaded"):
        model.generate([5], greedy(1, adapters=(("x", 1.0),)))
    for _ in range(10):  # more often than there are sequences
        with pytest.raises(Unsupported, match="no LoRA adapters"):
            answer(model, [5], greedy(1, adapters=(("style", 1.0),)))
    assert answer(model, [5], greedy(1)).tokens
    with pytest.raises(Unsupported, match="cannot see images"):
        model.generate([5, b"png"])


# -- guided text -------------------------------------------------------------------------------------


def test_json_schema_is_followed_by_a_random_model(load: Load) -> None:
    model, _ = load(context=256)
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["sea", "land"]}},
        "required": ["ok", "kind"],
    }
    for sampling in (
        {"temperature": 0},
        {"temperature": 1.5, "seed": 1},
        {"temperature": 1.0, "seed": 2, "mirostat": 2},
    ):
        made = model.complete("a boat: ", json_schema=json.dumps(schema), **sampling)
        found = json.loads(made.text)
        assert set(found) == {"ok", "kind"}
        assert made.finish_reason == "stop"


def test_grammars_are_followed_and_checked(load: Load) -> None:
    model, _ = load()
    for seed in range(3):
        made = model.complete(
            "wet?", grammar='root ::= "yes" | "no"', temperature=1, seed=seed, ignore_eos=True
        )
        assert made.text in ("yes", "no")
    for option, text in (
        ("grammar", "root ::= ("),
        ("json_schema", "{"),
        ("json_schema", '{"not": {"type": "string"}}'),
        ("json_schema", "true"),
    ):
        with pytest.raises(BadInput, match=option):
            model.complete("x", **{option: text})
