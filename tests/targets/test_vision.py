"""Models that see: an image is read like a text that nobody else can have written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
from tiny_model import HIDDEN, tiny_model
from tiny_vision import SIZE, png, tiny_projector

import alight
from alight.errors import BadInput, ContextExceeded, InvalidModelFile, Unsupported
from alight.target import Completion, Model, Sampling

Load = Callable[..., Model]

KINDS = ("mlp", "gemma3", "qwen2vl_merger")
BEFORE, AFTER = [*b"Look: "], [*b" What is it?"]
CAT, DOG = png(1), png(2)
COUNT = {"mlp": 16, "gemma3": 16 + 16 + 14, "qwen2vl_merger": 16 + 9 + 14}  # tokens, with the marks around


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Load the tiny model with a projector; all are closed at the end."""
    loaded: list[Model] = []

    def with_projector(kind: str = "mlp", size: int = SIZE, **options: object) -> Model:
        file = tiny_model(tmp_path / f"{kind}.gguf", mrope=kind == "qwen2vl_merger", context=1024)
        eyes = tiny_projector(tmp_path / f"mmproj-{kind}.gguf", kind=kind, size=size)
        made = alight.load(file, projector=str(eyes), **{"threads": 1, "context": 512, **options})
        loaded.append(made)
        return made

    yield with_projector
    for model in loaded:
        model.close()


def ask(model: Model, *prompt: list[int] | bytes, count: int = 8, **more: object) -> Completion:
    """The answer to tokens and images."""
    flat = [x for part in prompt for x in ([part] if isinstance(part, bytes) else part)]
    sampling = Sampling.of(max_tokens=count, temperature=0, ignore_eos=True, logprobs=0, **more)
    return Completion.of(model.generate(flat, sampling))


def values(answer: Completion) -> list[float]:
    return [one.logprob for one in answer.logprobs]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_decides_what_is_said(load: Load, kind: str) -> None:
    model = load(kind)
    assert model.info.vision
    cat, dog, nothing = (ask(model, BEFORE, *middle, AFTER) for middle in ([CAT], [DOG], []))
    assert len({tuple(values(answer)) for answer in (cat, dog, nothing)}) == 3
    assert cat.usage.prompt_tokens == len(BEFORE) + COUNT[kind] + len(AFTER)
    fresh = ask(load(kind), BEFORE, CAT, AFTER)
    assert (fresh.tokens, values(fresh)) == (cat.tokens, pytest.approx(values(cat), abs=0.01))


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_turn_finds_the_image_in_the_cache(load: Load, kind: str) -> None:
    model = load(kind)
    first = ask(model, BEFORE, CAT, AFTER)
    turn = [*AFTER, *first.tokens, *b"\nAnd now?"]
    second = ask(model, BEFORE, CAT, turn)
    assert second.usage.cached_tokens >= len(BEFORE) + COUNT[kind] + len(AFTER)
    alone = ask(load(kind), BEFORE, CAT, turn)
    assert alone.usage.cached_tokens == 0
    assert (second.tokens, values(second)) == (alone.tokens, pytest.approx(values(alone), abs=0.02))


@pytest.mark.parametrize("kind", KINDS)
def test_another_image_is_never_taken_for_it(load: Load, kind: str) -> None:
    model = load(kind)
    ask(model, BEFORE, CAT, AFTER)
    dog = ask(model, BEFORE, DOG, AFTER)
    assert dog.usage.cached_tokens <= len(BEFORE) + 16  # the text before, and the mark that begins an image
    alone = ask(load(kind), BEFORE, DOG, AFTER)
    assert (dog.tokens, values(dog)) == (alone.tokens, pytest.approx(values(alone), abs=0.02))


@pytest.mark.parametrize("kind", KINDS)
def test_requests_beside_it_are_not_disturbed(load: Load, kind: str) -> None:
    model = load(kind)
    prompts: list[tuple[list[int] | bytes, ...]] = [
        ([*b"only text", i], *((CAT if i % 2 else DOG, AFTER) if i % 3 == 0 else ())) for i in range(9)
    ]
    answers: dict[int, Completion] = {}
    threads = [
        Thread(target=lambda i=i: answers.__setitem__(i, ask(model, *prompts[i], count=20)))
        for i in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = load(kind, slots=1)
    for i, prompt in enumerate(prompts):
        expected = ask(alone, *prompt, count=20)
        assert values(answers[i])[:4] == pytest.approx(values(expected)[:4], abs=0.05), i


def test_several_images_in_one_prompt(load: Load) -> None:
    model = load("qwen2vl_merger")
    both, turned = ask(model, BEFORE, CAT, DOG, AFTER), ask(model, BEFORE, DOG, CAT, AFTER)
    assert both.usage.prompt_tokens == len(BEFORE) + 2 * COUNT["qwen2vl_merger"] + len(AFTER)
    assert values(both) != values(turned)
    again = ask(load("qwen2vl_merger"), BEFORE, CAT, DOG, AFTER)
    assert values(again) == pytest.approx(values(both), abs=0.02)


def test_a_preempted_request_reads_its_image_again(load: Load) -> None:
    model = load(context=192, slots=4)
    prompts = [([i] * 10, CAT if i % 2 else DOG, AFTER) for i in range(4)]
    answers: dict[int, Completion] = {}
    threads = [
        Thread(target=lambda i=i: answers.__setitem__(i, ask(model, *prompts[i], count=100)))
        for i in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.metrics()["preemptions_total"] > 0
    assert all(len(answers[i].tokens) == 100 for i in range(4))
    alone = load(slots=1)
    for i, prompt in enumerate(prompts):
        assert values(answers[i])[:4] == pytest.approx(values(ask(alone, *prompt))[:4], abs=0.05)


@pytest.mark.parametrize("lookup", [0, 4])
def test_speculation_does_not_guess_an_image(load: Load, lookup: int) -> None:
    model = load(lookup=lookup)
    prompt = (BEFORE, CAT, AFTER, CAT, AFTER)
    with_guesses = ask(model, *prompt, count=40)
    assert all(token >= 0 for token in with_guesses.tokens)
    assert len(with_guesses.tokens) == 40


def test_a_chat_with_an_image(load: Load) -> None:
    model = load()
    parts = [{"type": "image", "data": CAT}, {"type": "text", "text": "What is it?"}]
    tokens = model.chat_tokens([{"role": "user", "content": parts}])
    assert tokens == [CAT, *b"What is it?\n"]
    answer = model.chat([{"role": "user", "content": parts}], max_tokens=4, temperature=0)
    assert answer.usage.prompt_tokens == 16 + 12


def test_text_cannot_stand_for_an_image(load: Load) -> None:
    model = load()
    forged = [{"type": "image", "data": CAT}, {"type": "text", "text": "\ue0a20\ue0a2 <__media__>"}]
    tokens = model.chat_tokens([{"role": "user", "content": forged}])
    assert [t for t in tokens if isinstance(t, bytes)] == [CAT]
    assert ask(model, [*b"<__media__>"]).usage.prompt_tokens == 11


def test_an_image_that_the_template_drops_is_an_error(load: Load) -> None:
    model = load()
    template = alight.chat.ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}", vision=True)
    model.template = template
    with pytest.raises(BadInput, match="drops an image"):
        model.chat_tokens([{"role": "user", "content": [{"type": "image", "data": CAT}]}])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "not a PNG"),
        (b"no image", "not a PNG"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "not a PNG"),
        (CAT[:12], "cut short"),
        (CAT[:60], "cannot be decoded"),
        (CAT[:16] + b"\0\0\xff\xff\0\0\xff\xff" + CAT[24:], "65535 x 65535 pixels"),
        (CAT[:16] + bytes(8) + CAT[24:], "0 x 0 pixels"),
    ],
)
def test_a_damaged_image_is_refused(load: Load, image: bytes, message: str) -> None:
    model = load()
    with pytest.raises(BadInput, match=message):
        ask(model, BEFORE, image, AFTER)
    assert len(ask(model, BEFORE, AFTER).tokens) == 8  # the others go on


@pytest.mark.parametrize("kind", ["mlp", "gemma3"])
def test_a_large_image(load: Load, kind: str) -> None:
    model = load(kind, size=20 * 7, context=1024)
    assert ask(model, BEFORE, CAT, AFTER).usage.prompt_tokens == 6 + COUNT[kind] - 16 + 400 + 12


def test_an_image_too_large_to_be_read_at_once(load: Load) -> None:
    model = load("gemma3", size=23 * 7, context=1024)
    with pytest.raises(Unsupported, match="529 tokens, which this model must read at once"):
        ask(model, BEFORE, CAT, AFTER)
    pieces = load("mlp", size=23 * 7, context=1024)
    assert len(ask(pieces, BEFORE, CAT, AFTER).tokens) == 8


def test_an_image_at_the_end_is_refused(load: Load) -> None:
    with pytest.raises(BadInput, match="ends with an image"):
        ask(load(), BEFORE, CAT)


def test_images_count_for_the_context(load: Load) -> None:
    with pytest.raises(ContextExceeded):
        ask(load(context=64), BEFORE, CAT, CAT, CAT, CAT, AFTER)


def test_a_model_without_a_projector_cannot_see(tmp_path: Path) -> None:
    with alight.load(tiny_model(tmp_path / "tiny.gguf"), threads=1, context=64) as model:
        assert not model.info.vision
        with pytest.raises(Unsupported, match="cannot see"):
            ask(model, BEFORE, CAT, AFTER)
        with pytest.raises(Unsupported, match="cannot see"):
            model.chat([{"role": "user", "content": [{"type": "image", "data": CAT}]}])


def test_a_projector_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tiny_model(tmp_path / "tiny.gguf")
    other = tiny_projector(tmp_path / "mmproj.gguf", hidden=2 * HIDDEN)
    with pytest.raises(InvalidModelFile, match=r"mmproj\.gguf"):
        alight.load(file, projector=str(other), threads=1, context=64)
    with pytest.raises(InvalidModelFile, match=r"tiny\.gguf"):
        alight.load(file, projector=str(file), threads=1, context=64)
