"""The batching engine: what each request gets does not depend on what else runs."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import tiny_adapter, tiny_model

import alight
from alight.errors import BadInput, EngineError, InvalidModelFile
from alight.planner import BATCH
from alight.target import Completion, LoadOptions, Model, Sampling
from alight_targets.llama_cpp import CpuTarget
from alight_targets.llama_cpp.speculative import lookup

Load = Callable[..., Model]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Load the tiny model with some options; all are closed at the end."""
    loaded: list[Model] = []

    def with_options(**options: object) -> Model:
        file = tiny_model(tmp_path / "tiny.gguf")
        made = alight.load(file, **{"threads": 1, "context": 256, **options})
        loaded.append(made)
        return made

    yield with_options
    for model in loaded:
        model.close()


def greedy(count: int, **more: object) -> Sampling:
    return Sampling.of(max_tokens=count, temperature=0, ignore_eos=True, **more)


def together(model: Model, prompts: list[list[int]], sampling: Sampling) -> list[tuple[int, ...]]:
    """Answers to all prompts, asked at once."""
    answers: list[tuple[int, ...]] = [()] * len(prompts)

    def ask(i: int) -> None:
        answers[i] = Completion.of(model.generate(prompts[i], sampling)).tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return answers


def same_up_to_a_tie(got: Sequence[int], expected: Completion) -> bool:
    """Equal, or different first where the two likeliest tokens are nearer than rounding: a batch of another
    size sums in another order, and the KV cache keeps 11 bits."""
    for token, wanted in zip(got, expected.logprobs, strict=False):
        if token != wanted.token:
            (_, _, best), (second, _, next_best) = wanted.top
            return token == second and best - next_best < 0.02
    return len(got) <= len(expected.tokens)


def assert_as_alone(alone: Model, prompts: list[list[int]], answers: list[tuple[int, ...]]) -> None:
    """Each answer is what the prompt gets when nothing else runs."""
    for prompt, got in zip(prompts, answers, strict=True):
        expected = Completion.of(alone.generate(prompt, greedy(len(got), logprobs=2)))
        assert got
        assert same_up_to_a_tie(got, expected), f"{prompt}: {got} instead of {expected.tokens}"


def test_a_finished_conversation_is_read_only_once(load: Load) -> None:
    model = load()
    first = Completion.of(model.generate([1, 2, 3, 4] * 10, greedy(8)))
    again = [1, 2, 3, 4] * 10 + list(first.tokens) + [9, 9, 9]
    second = Completion.of(model.generate(again, greedy(8)))
    assert second.usage.cached_tokens >= 40 + 7
    assert second.usage.prompt_tokens == 51
    fresh = load()
    assert Completion.of(fresh.generate(again, greedy(8))).tokens == second.tokens


def test_arrivals_at_once_read_a_common_beginning_once(load: Load) -> None:
    model = load(context=512)
    system = [random.Random(1).randrange(200) for _ in range(200)]
    prompts = [[*system, i, i + 1] for i in range(6)]
    answers = together(model, prompts, greedy(6))
    metrics = model.metrics()
    assert metrics["cached_tokens_total"] >= 5 * 200
    assert_as_alone(load(context=512), prompts, answers)


def test_preempted_requests_are_resumed(load: Load) -> None:
    model = load(context=256, slots=8)
    prompts = [[i] * 60 for i in range(8)]
    answers = together(model, prompts, greedy(180))  # 8 x 240 tokens in 256 cells
    assert model.metrics()["preemptions_total"] > 0
    assert_as_alone(load(context=256), prompts, answers)


def test_more_requests_than_slots_wait(load: Load) -> None:
    model = load(slots=2)
    prompts = [[i, i + 1] for i in range(9)]
    assert_as_alone(model, prompts, together(model, prompts, greedy(5)))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=30),  # few different tokens: much is shared
            st.integers(1, 20),  # tokens to make
            st.integers(0, 25),  # cancelled after so many chunks
        ),
        min_size=1,
        max_size=10,
    )
)
def test_each_gets_what_it_gets_alone(
    shared_pair: tuple[Model, Model], requests: list[tuple[list[int], int, int]]
) -> None:
    crowded, alone = shared_pair
    failures: list[str] = []

    def ask(prompt: list[int], count: int, patience: int) -> None:
        got: list[int] = []
        stream = crowded.generate(prompt, greedy(count))
        for n, chunk in enumerate(stream):
            got += chunk.tokens
            if n == patience:
                stream.close()
                break
        with lock:
            expected = Completion.of(alone.generate(prompt, greedy(count, logprobs=2)))
            if not same_up_to_a_tie(got, expected):
                failures.append(f"{prompt}: {got} instead of {expected.tokens}")

    lock = threading.Lock()
    threads = [threading.Thread(target=ask, args=r) for r in requests]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.fixture(scope="module")
def shared_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Model]]:
    """One model with too little room for all, and one that serves one request at a time."""
    file = tiny_model(tmp_path_factory.mktemp("pair") / "tiny.gguf")
    with (
        alight.load(file, threads=1, context=96, slots=5) as crowded,
        alight.load(file, threads=1, context=256, slots=1) as alone,
    ):
        yield crowded, alone


# -- speculative decoding ----------------------------------------------------------------------------


def test_lookup_guesses_what_came_before() -> None:
    assert lookup([1, 2, 3, 7, 8, 9, 1, 2, 3], 2) == [7, 8]
    assert lookup([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 9) == [5, 1, 2, 3], "the latest place counts"
    assert lookup([1, 2, 3, 4], 3) == []
    assert lookup([], 3) == []


@pytest.mark.parametrize("how", ["lookup", "same draft", "other draft"])
def test_speculation_changes_nothing_but_the_work(load: Load, tmp_path: Path, how: str) -> None:
    options = {"lookup": 6} if how == "lookup" else {}
    if how != "lookup":
        other = tiny_model(tmp_path / "draft.gguf", seed=0 if how == "same draft" else 5)
        options = {"draft": str(other)}
    plain, quick = load(), load(**options)
    prompts = [[1, 2, 3, 4, 5, 6, 1, 2, 3], [7, 8, 9], [5] * 20]
    for prompt in prompts:
        assert_as_alone(plain, [prompt], [Completion.of(quick.generate(prompt, greedy(40))).tokens])
    assert_as_alone(plain, prompts, together(quick, prompts, greedy(30)))
    metrics = quick.metrics()
    drafted, accepted = metrics["drafted_tokens_total"], metrics["accepted_tokens_total"]
    assert drafted >= accepted
    if how == "same draft":
        assert accepted > 0.9 * drafted > 0
        assert metrics["steps_total"] < plain.metrics()["steps_total"]


def test_a_draft_with_another_vocabulary_is_refused(load: Load, smollm2_file: Path) -> None:
    with pytest.raises(BadInput, match="vocabulary of 49152, the model one of 258"):
        load(draft=str(smollm2_file))


# -- LoRA --------------------------------------------------------------------------------------------


def test_adapters_are_chosen_per_request(load: Load, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "style.gguf")
    model = load(adapters=(("style", str(adapter)),))
    plain, styled = greedy(20), greedy(20, adapters=(("style", 1.0),))
    prompt = [1, 2, 3]
    alone = [Completion.of(model.generate(prompt, s)).tokens for s in (plain, styled)]
    assert alone[0] != alone[1]
    assert Completion.of(model.generate(prompt, greedy(20, adapters=(("style", 0.0),)))).tokens == alone[0]
    answers: dict[int, tuple[int, ...]] = {}
    threads = [
        threading.Thread(
            target=lambda i=i: answers.__setitem__(
                i, Completion.of(model.generate(prompt, styled if i % 2 else plain)).tokens
            )
        )
        for i in range(6)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [answers[i] for i in range(6)] == alone * 3, "together, and with each other's prompts in the cache"


def test_unknown_and_damaged_adapters(load: Load, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no adapter 'x' is loaded"):
        list(load().generate([1], greedy(1, adapters=(("x", 1.0),))))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF nonsense")
    with pytest.raises(InvalidModelFile, match=r"adapter bad\.gguf"):
        load(adapters=(("bad", str(bad)),))


# -- limits ------------------------------------------------------------------------------------------


def test_shift_goes_on_where_the_context_ends(load: Load) -> None:
    ends = Completion.of(load(context=64).generate([1] * 40, greedy(100)))
    assert (ends.finish_reason, ends.usage.completion_tokens) == ("length", 24)
    goes_on = Completion.of(load(context=64, shift=True).generate([1] * 40, greedy(100)))
    assert goes_on.usage.completion_tokens == 100


def test_prompts_survive_a_restart(load: Load, tmp_path: Path) -> None:
    folder = str(tmp_path / "prompts")
    system = [random.Random(2).randrange(200) for _ in range(100)]
    model = load(prompt_cache=folder)
    expected = Completion.of(model.generate([*system, 1, 2], greedy(8))).tokens
    list(model.generate([*system, 3, 4], greedy(8)))  # the second one shows that the beginning is shared
    model.close()
    again = Completion.of(load(prompt_cache=folder).generate([*system, 1, 2], greedy(8)))
    assert again.usage.cached_tokens >= 100
    assert again.tokens == expected


def test_damaged_saved_prompts_do_no_harm(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    system = list(range(100))
    model = load(prompt_cache=str(folder))
    expected = Completion.of(model.generate([*system, 1], greedy(4))).tokens
    list(model.generate([*system, 2], greedy(4)))
    model.close()
    for file in folder.rglob("*.kv"):
        file.write_bytes(file.read_bytes()[:50])
    again = Completion.of(load(prompt_cache=str(folder)).generate([*system, 1], greedy(4)))
    assert again.tokens == expected
    assert again.usage.cached_tokens == 0


def test_closing_ends_what_runs(load: Load) -> None:
    model = load(context=512)
    stream = model.generate([1], greedy(500))
    next(stream)
    model.close()
    with pytest.raises(EngineError, match="closed"):
        list(stream)


def test_cancelled_requests_make_room(load: Load) -> None:
    model = load(slots=1, context=512)
    first = model.generate([1], greedy(400))
    next(first)
    first.close()
    assert Completion.of(model.generate([2], greedy(3))).usage.completion_tokens == 3
    assert model.metrics()["running"] == 0


def test_a_long_score_holds_nobody_up(tmp_path: Path) -> None:
    long = [1, 2, 3] * 1000
    with alight.load(tiny_model(tmp_path / "long.gguf", context=4096), threads=1, context=4096) as model:
        expected = model.score(long).logprobs
        stream = model.generate([1, 2, 3], greedy(2000))
        next(stream)
        scores: list[object] = []
        scoring = threading.Thread(target=lambda: scores.append(model.score(long).logprobs.tolist()))
        scoring.start()
        made = 0
        while scoring.is_alive():
            made += len(next(stream).tokens)
        stream.close()
    assert made >= len(long) // BATCH, "a token after each part of the text"
    assert scores == [expected.tolist()]


def test_cells_in_use_are_counted(load: Load) -> None:
    model = load(slots=2, context=256)
    assert (model.metrics()["kv_cells_used"], model.metrics()["kv_cells"]) == (0, 256)
    Completion.of(model.generate([7] * 50, greedy(10)))
    assert model.metrics()["kv_cells_used"] in (58, 59)  # after the last or last but one step
    stream = model.generate([8] * 30, greedy(100))
    for _ in range(20):
        next(stream)
    assert 30 < model.metrics()["kv_cells_used"] <= 59 + 130


# -- sampling on the real model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smollm2: alight.Artifact) -> Iterator[Model]:
    with CpuTarget().load(smollm2, LoadOptions(context=512)) as model:
        yield model


def test_json_schema_is_followed(real: Model) -> None:
    import json

    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    for seed in range(3):
        made = real.complete(
            "A person: ", json_schema=json.dumps(schema), max_tokens=60, temperature=1.0, seed=seed
        )
        person = json.loads(made.text)
        assert set(person) == {"name", "age"}
        assert isinstance(person["age"], int)


def test_grammar_is_followed_and_checked(real: Model) -> None:
    made = real.complete("Is water wet?", grammar='root ::= "yes" | "no"', max_tokens=9)
    assert made.text in ("yes", "no")
    with pytest.raises(BadInput, match="grammar"):
        real.complete("x", grammar="root ::= (")
    with pytest.raises(BadInput, match="json_schema"):
        real.complete("x", json_schema="{")


def test_logprobs_are_those_of_score(real: Model) -> None:
    prompt = real.tokenize("The capital of France is")
    made = real.complete(prompt, max_tokens=5, temperature=0, logprobs=3)
    scores = real.score([*prompt, *made.tokens]).logprobs[len(prompt) - 1 :]
    assert [p.logprob for p in made.logprobs] == pytest.approx(scores.tolist(), abs=0.15)
    for p in made.logprobs:
        assert len(p.top) == 3
        assert p.top[0][0] == p.token, "greedy takes the likeliest"
        assert p.top[0][2] == pytest.approx(p.logprob)


def test_logit_bias(real: Model) -> None:
    (yes,) = real.tokenize(" banana"[:7])[:1]
    made = real.complete("I like", max_tokens=3, temperature=0, logit_bias=((yes, 100.0),))
    assert set(made.tokens) == {yes}


@pytest.mark.parametrize(
    "options",
    [
        {"typical_p": 0.5},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"mirostat": 1},
        {"mirostat": 2, "mirostat_tau": 2.0},
        {"frequency_penalty": 1.5},
        {"min_p": 0.5},
    ],
)
def test_every_sampler_works_and_is_seeded(load: Load, options: dict[str, float]) -> None:
    model = load()
    prompt = [1, 2, 3] * 5

    def answers(**more: float) -> list[tuple[int, ...]]:
        return [
            model.complete(prompt, seed=s, max_tokens=12, temperature=1.0, **more).tokens for s in range(4)
        ]

    assert answers(**options) == answers(**options)
    assert answers(**options) != answers()


def test_dry_breaks_a_loop(real: Model) -> None:
    prompt = "one two three one two three one two three one two three one two"
    loop = real.complete(prompt, temperature=0, max_tokens=9).text
    assert loop.startswith(" three one two three")
    dry = real.complete(prompt, temperature=0, max_tokens=9, dry_multiplier=5.0, dry_allowed_length=1).text
    assert not dry.startswith(" three one two three")


def test_same_seed_same_text_among_others(load: Load) -> None:
    model = load()
    sampling = Sampling(max_tokens=12, temperature=0.7, seed=11, ignore_eos=True)
    prompts = [[i, i + 1, i + 2] for i in range(6)]
    alone = [Completion.of(model.generate(p, sampling)).tokens for p in prompts]
    same = sum(a == b for a, b in zip(together(model, prompts, sampling), alone, strict=True))
    assert same >= 5, "rounding may turn one of them at a near tie; docs/engine.md says when"


def test_embeddings_know_what_is_alike(real: Model) -> None:
    import numpy as np

    cat, kitten, market = real.embed(["A cat sleeps.", "A kitten is sleeping.", "Shares fell by 3 %."])
    assert np.linalg.norm(cat) == pytest.approx(1, abs=1e-5)
    assert cat @ kitten > cat @ market
    assert np.allclose(real.embed(["A cat sleeps."])[0], cat, atol=1e-2)
    assert not np.allclose(real.embed(["A cat sleeps."], pooling="last")[0], cat, atol=1e-2)
    with pytest.raises(BadInput, match="empty"):
        real.embed([""])
    scores = real.rerank("Where is the cat?", ["The cat is on the roof.", "Inflation is high."])
    assert scores[0] > scores[1]


def test_strings_of_a_schema_have_no_raw_line_breaks() -> None:
    from alight_targets.llama_cpp.grammar import gbnf_of

    gbnf = gbnf_of(Sampling(json_schema='{"type": "object", "properties": {"a": {"type": "string"}}}'))
    assert r"\x00-\x1F" in gbnf
    assert r'[^"\\] ' not in gbnf
