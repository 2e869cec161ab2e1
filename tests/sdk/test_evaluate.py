"""Quality and speed of real models, with answers known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import alight
from alight import evaluate
from alight.errors import BadInput
from alight.target import Model
from alight.testing import EchoModel
from alight_converters.quantize.gguf import quantize

TEXT = (
    "The lighthouse stood at the end of the pier. Every evening the keeper climbed the stairs, lit the lamp and "
    "wrote the weather into a book. Ships passed in the dark, and their crews looked for the light. In winter the "
    "waves broke over the stones, and the keeper could not go to town for weeks. He read old letters then, and "
    "repaired nets, and waited for the wind to turn. "
)


@pytest.fixture(scope="module")
def source(smollm2_file: Path) -> Iterator[Model]:
    with alight.load(smollm2_file, context=512) as model:
        yield model


def test_a_model_does_not_differ_from_itself(source: Model) -> None:
    windows = evaluate.windows_of(source, TEXT, 200)
    same = evaluate.compare(source, evaluate.Reference.of(source, windows))
    assert same.kl_mean == pytest.approx(0, abs=1e-4)
    assert same.top1 == 1.0
    assert same.perplexity == pytest.approx(evaluate.quality(source, windows).perplexity, rel=1e-3)
    assert 2 < same.perplexity < 60, "plain English is easy for this model"


def test_coarser_is_worse(source: Model, smollm2_file: Path, tmp_path: Path) -> None:
    reference = evaluate.Reference.of(source, evaluate.windows_of(source, TEXT, 120))
    found = []
    for kind in ("Q8_0", "Q4_0", "Q2_K"):
        with alight.load(quantize(smollm2_file, tmp_path / f"{kind}.gguf", kind), context=512) as model:
            found.append(evaluate.compare(model, reference))
    q8, q4, q2 = found
    assert q8.kl_mean and q4.kl_mean and q2.kl_mean
    assert 0 < q8.kl_mean < 0.02 < q4.kl_mean < q2.kl_mean
    assert q8.kl_p99 and q8.kl_p99 >= q8.kl_mean
    assert q8.top1 and q2.top1 and q8.top1 > q2.top1


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    echo = EchoModel()
    assert evaluate.quality(echo, evaluate.windows_of(echo, TEXT, 200)).perplexity == pytest.approx(
        257, rel=1e-4
    )


def test_text_sampled_from_the_source_is_seeded(smollm2_file: Path) -> None:
    def sampled(seed: int) -> list[list[int]]:
        with alight.load(smollm2_file, context=512) as fresh:
            return evaluate.sample_text(fresh, 64, seed=seed)

    first, second, other = (sampled(s) for s in (1, 1, 2))
    assert first == second != other


def test_speed_is_measured(source: Model) -> None:
    speed = evaluate.speed(source, prompt_tokens=32, new_tokens=8, rounds=2)
    assert speed.prefill > 0
    assert speed.decode > 0
    assert speed.first_token > 0
    assert (speed.prompt_tokens, speed.rounds) == (32, 2)


def test_models_without_a_shared_tokenizer(source: Model) -> None:
    reference = evaluate.Reference.of(EchoModel(), [[1, 2, 3, 4]])
    with pytest.raises(BadInput, match="vocabulary"):
        evaluate.compare(source, reference)


def test_too_short_a_text(source: Model) -> None:
    with pytest.raises(BadInput, match="At least 32"):
        evaluate.windows_of(source, "hello", 100)
