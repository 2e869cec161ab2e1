"""The sampler against llama.cpp's own chain: the same logits and options, the same distribution."""

from __future__ import annotations

import ctypes
import math
from collections import Counter

import llama_cpp as C
import numpy as np
import pytest
import tiny_backend
from numpy.typing import NDArray

from alight.errors import BadInput, EngineError
from alight.target import Sampling
from alight_targets.common.dry import Dry
from alight_targets.common.sampler import Sampler
from alight_targets.common.tokenizer import Tokenizer

N = 200  # tokens of the made-up vocabulary
HISTORY = [7, 3, 9, 4, 5, 6, 1, 2, 3, 9, 4, 5, 6]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_backend.tokenizer_folder(tmp_path_factory.mktemp("tokenizer")), "onnx")


@pytest.fixture(scope="module")
def logits() -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(0, 2, N).astype(np.float32)


def theirs(logits: NDArray[np.float32], *samplers: object, history: list[int]) -> dict[int, float]:
    """The distribution that llama.cpp's samplers leave."""
    data = (C.llama_token_data * N)(
        *(C.llama_token_data(id=i, logit=float(x), p=0.0) for i, x in enumerate(logits))
    )
    array = C.llama_token_data_array(data=data, size=N, selected=-1, sorted=False)
    for sampler in samplers:
        for token in history:
            C.llama_sampler_accept(sampler, token)
        C.llama_sampler_apply(sampler, ctypes.byref(array))
        C.llama_sampler_free(sampler)
    kept = {array.data[i].id: array.data[i].logit for i in range(array.size)}
    top = max(kept.values())
    weights = {t: math.exp(x - top) for t, x in kept.items()}
    return {t: w / sum(weights.values()) for t, w in weights.items()}


def ours(
    tokenizer: Tokenizer, logits: NDArray[np.float32], sampling: Sampling, draws: int = 6000
) -> Counter[int]:
    sampler = Sampler(sampling, tokenizer, N)
    return Counter(sampler.sample(logits, HISTORY) for _ in range(draws))


CASES = {
    "temperature": ({}, lambda: []),
    "top_k": ({"top_k": 7}, lambda: [C.llama_sampler_init_top_k(7)]),
    "top_p": ({"top_p": 0.7}, lambda: [C.llama_sampler_init_top_p(0.7, 1)]),
    "min_p": ({"min_p": 0.2}, lambda: [C.llama_sampler_init_min_p(0.2, 1)]),
    "typical": ({"typical_p": 0.5}, lambda: [C.llama_sampler_init_typical(0.5, 1)]),
    "xtc": ({"xtc_probability": 1.0, "xtc_threshold": 0.05}, lambda: [C.llama_sampler_init_xtc(1.0, 0.05, 1, 3)]),
    "penalties": (
        {"repeat_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2, "repeat_last_n": 8},
        lambda: [C.llama_sampler_init_penalties(N, 8, 1.3, 0.4, 0.2)],
    ),
    "all": (
        {"top_k": 50, "typical_p": 0.9, "top_p": 0.8, "min_p": 0.02, "repeat_penalty": 1.2, "repeat_last_n": -1},
        lambda: [
            C.llama_sampler_init_penalties(N, 64, 1.2, 0.0, 0.0),
            C.llama_sampler_init_top_k(50),
            C.llama_sampler_init_typical(0.9, 1),
            C.llama_sampler_init_top_p(0.8, 1),
            C.llama_sampler_init_min_p(0.02, 1),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_distribution_as_llama_cpp(
    tokenizer: Tokenizer, logits: NDArray[np.float32], case: str
) -> None:
    options, chain = CASES[case]
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 0.9, "seed": 11}
    expected = theirs(logits, *chain(), C.llama_sampler_init_temp(0.9), history=HISTORY)
    found = ours(tokenizer, logits, Sampling(**(off | options)))
    draws = sum(found.values())
    assert set(found) <= set(expected)
    assert 0.5 * sum(abs(expected[t] - found[t] / draws) for t in expected) < 0.06
    if len(expected) < 30:
        assert set(found) == {t for t, p in expected.items() if p > 1e-3}


def test_dry_lowers_what_llama_cpp_lowers(tokenizer: Tokenizer) -> None:
    """Longest repetitions: after 9 4 5 6 came 1, so 1 would make it five; no other place fits."""
    settings = (2.0, 1.75, 2, 64)
    expected = theirs(np.zeros(N, np.float32), _dry(*settings), history=HISTORY)
    sampling = Sampling(dry_multiplier=2.0, dry_base=1.75, dry_allowed_length=2, dry_sequence_breakers=())
    lowered = np.zeros(N, np.float32)
    Dry(sampling, tokenizer).apply(lowered, HISTORY)
    weights = np.exp(lowered) / np.exp(lowered).sum()
    assert weights == pytest.approx(np.array([expected[t] for t in range(N)]), rel=1e-4)
    assert lowered[1] == pytest.approx(-2.0 * 1.75 ** (5 - 2))
    assert np.count_nonzero(lowered) == 1


def _dry(multiplier: float, base: float, allowed: int, last_n: int) -> object:
    # The vocabulary is only needed for sequence breakers.
    return C.llama_sampler_init_dry(None, multiplier, base, allowed, last_n, None, 0)


def test_dry_does_not_look_past_a_breaker(tokenizer: Tokenizer) -> None:
    text = "the old map: the old map"
    tokens = tokenizer.tokenize(text)
    for breakers, lowers in (((), True), (("old",), False), (("ld map",), False), (("zebra",), True)):
        lowered = np.zeros(tokenizer.vocabulary, np.float32)
        Dry(Sampling(dry_multiplier=1, dry_sequence_breakers=breakers), tokenizer).apply(lowered, tokens)
        assert bool(lowered.any()) == lowers, breakers


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_keeps_the_surprise(tokenizer: Tokenizer, version: int) -> None:
    random = np.random.default_rng(2)
    sampler = Sampler(Sampling(mirostat=version, mirostat_tau=3.0, temperature=1.0, seed=1), tokenizer, 5000)
    surprises = []
    for _ in range(1500):
        logits = (-1.1 * np.log(random.permutation(5000) + 1.0)).astype(np.float32)  # Zipf's law
        token = sampler.sample(logits, [])
        surprises.append(-sampler.logprob(logits, token).logprob / math.log(2))
    assert np.mean(surprises[500:]) > 3.0, "what is cut away makes the rest likelier than it was"
    sharp = Sampler(Sampling(mirostat=version, mirostat_tau=0.5, temperature=1.0, seed=1), tokenizer, 5000)
    tame = [-sharp.logprob(logits, sharp.sample(logits, [])).logprob for _ in range(200)]
    assert np.mean(tame[50:]) / math.log(2) < np.mean(surprises[500:])


def test_greedy_is_the_likeliest_that_is_allowed(tokenizer: Tokenizer, logits: NDArray[np.float32]) -> None:
    order = np.argsort(-logits)
    best = int(order[0])
    assert Sampler(Sampling(temperature=0), tokenizer, N).sample(logits, []) == best
    banned = Sampling(temperature=0, logit_bias=((best, -math.inf), (int(order[5]), 0.0)))
    assert Sampler(banned, tokenizer, N).sample(logits, []) == order[1]
    forced = Sampling(temperature=0, logit_bias=((int(order[-1]), math.inf),))
    assert Sampler(forced, tokenizer, N).sample(logits, []) == order[-1]
    (end,) = tokenizer.ends
    raised = logits.copy()
    raised[end] = 99
    assert Sampler(Sampling(temperature=0), tokenizer, N).sample(raised, []) == end
    assert Sampler(Sampling(temperature=0, ignore_eos=True), tokenizer, N).sample(raised, []) == best


def test_logits_are_left_as_they_are(tokenizer: Tokenizer, logits: NDArray[np.float32]) -> None:
    before = logits.copy()
    Sampler(Sampling(repeat_penalty=2.0, seed=1, logit_bias=((3, 5.0),)), tokenizer, N).sample(
        logits, HISTORY
    )
    assert np.array_equal(logits, before)


def test_a_seed_repeats_itself(tokenizer: Tokenizer, logits: NDArray[np.float32]) -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=2.0, seed=seed), tokenizer, N)
        return [sampler.sample(logits, []) for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(-5) == draw(-5) != draw(5)
    assert draw(None) != draw(None)


def test_logprobs_are_of_the_model_itself(tokenizer: Tokenizer, logits: NDArray[np.float32]) -> None:
    sampler = Sampler(Sampling(logprobs=3, temperature=5.0, logit_bias=((3, 50.0),)), tokenizer, N)
    found = sampler.logprob(logits, 3)
    expected = logits - np.log(np.exp(logits).sum())
    assert found.logprob == pytest.approx(float(expected[3]), abs=1e-4)
    assert [t for t, _, _ in found.top] == np.argsort(-logits)[:3].tolist()


def test_what_cannot_be(tokenizer: Tokenizer, logits: NDArray[np.float32]) -> None:
    with pytest.raises(BadInput, match="logit_bias names token 200"):
        Sampler(Sampling(logit_bias=((200, 1.0),)), tokenizer, N)
    for temperature in (0.0, 1.0):
        with pytest.raises(EngineError, match="no token"):
            sampler = Sampler(Sampling(temperature=temperature), tokenizer, N)
            sampler.sample(np.full(N, np.nan, np.float32), [])
