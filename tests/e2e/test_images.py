"""Images through the APIs, with the official clients, to a model that sees and one that does not."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
from tiny_model import tiny_model
from tiny_vision import png, tiny_projector

from alight import api
from alight.server import Models, running
from alight.store import Store
from alight.target import LoadOptions

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
CAT, DOG = png(1), png(2)
SEEN = 16  # tokens of an image


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("seeing")
    tiny_model(folder / "tiny.gguf")
    store = Store(tmp_path_factory.mktemp("store"))
    api.pull(str(folder / "tiny.gguf"), name="blind", store=store)
    tiny_projector(folder / "mmproj-tiny.gguf")
    api.pull(str(folder), name="seeing", store=store)
    with Models(store, LoadOptions(context=512, threads=1)) as models, running(models) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def llama(url: str) -> ollama.Client:
    return ollama.Client(host=url, timeout=60, trust_env=False)


def question(*images: str) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": image, "detail": "low"}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def test_openai_chat(client: openai.OpenAI) -> None:
    answers = []
    for image in (CAT, DOG, CAT):
        messages = question(data_url(image))
        answer = client.chat.completions.create(model="seeing", messages=messages, logprobs=True, **GREEDY)
        assert answer.usage
        assert answer.usage.prompt_tokens == SEEN + len("What is it?\n")
        assert answer.choices[0].logprobs
        answers.append([token.logprob for token in answer.choices[0].logprobs.content or []])
        cached = answer.usage.prompt_tokens_details
    assert answers[0] == pytest.approx(answers[2], abs=0.02)
    assert answers[0] != pytest.approx(answers[1], abs=0.02)
    assert cached and cached.cached_tokens and cached.cached_tokens >= SEEN  # the cat was seen before


def test_openai_responses(client: openai.OpenAI) -> None:
    content: Any = [
        {"type": "input_text", "text": "What is it?"},
        {"type": "input_image", "image_url": data_url(CAT), "detail": "auto"},
        {"type": "input_text", "text": " Tell."},
    ]
    first = client.responses.create(
        model="seeing", input=[{"role": "user", "content": content}], max_output_tokens=4
    )
    assert first.usage and first.usage.input_tokens == SEEN + len("What is it? Tell.\n")
    more = client.responses.create(
        model="seeing", input="And now?", previous_response_id=first.id, max_output_tokens=4
    )
    assert more.usage and more.usage.input_tokens_details.cached_tokens >= SEEN


def test_ollama(llama: ollama.Client) -> None:
    options = {"temperature": 0, "num_predict": 6}
    message = {"role": "user", "content": "What is it?", "images": [CAT]}
    chat = llama.chat("seeing", [message], options=options)
    assert chat.prompt_eval_count == SEEN + len("What is it?\n")
    for fields in ({}, {"raw": True}):
        whole = llama.generate("seeing", "What is it?", images=[CAT, DOG], options=options, **fields)
        assert whole.prompt_eval_count == 2 * SEEN + len("What is it?" if fields else "What is it?\n")
        assert whole.context is None
    told = llama.show("seeing")
    assert "vision" in (told.capabilities or [])
    assert "vision" not in (llama.show("blind").capabilities or [])


def test_what_sees_is_told(url: str, llama: ollama.Client) -> None:
    llama.generate("seeing", "")
    llama.generate("blind", "")
    loaded = {m["name"]: m for m in httpx.get(f"{url}/alight/v1/models").json()["models"]}
    assert loaded["seeing"]["vision"] and not loaded["blind"]["vision"]
    shown = httpx.post(f"{url}/api/show", json={"model": "seeing"}).json()
    assert shown["projector_info"]["clip.projector_type"] == "mlp"


@pytest.mark.parametrize(
    ("model", "image", "message"),
    [
        ("blind", data_url(CAT), "messages[0].content`: this model cannot see images"),
        ("seeing", "https://example.org/cat.png", "this server fetches no images"),
        ("seeing", "file:///etc/passwd", "this server fetches no images"),
        ("seeing", "data:image/png;base64", "cut short"),
        ("seeing", "data:image/png;base64,%%%", "not base64"),
        ("seeing", "data:image/png;base64,aGk=", "not a PNG"),
        ("seeing", data_url(CAT[:70]), "cannot be decoded"),
    ],
)
def test_what_cannot_be_used_is_refused(client: openai.OpenAI, model: str, image: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=question(image), **GREEDY)
    assert message in refused.value.message


def test_ollama_refuses(llama: ollama.Client, url: str) -> None:
    with pytest.raises(ollama.ResponseError, match=r"`messages\[0\].images`: this model cannot see"):
        llama.chat("blind", [{"role": "user", "content": "x", "images": [CAT]}])
    with pytest.raises(ollama.ResponseError, match="`images`: this model cannot see"):
        llama.generate("blind", "x", images=[CAT])
    body = {"model": "seeing", "prompt": "x", "images": ["no base64!"]}
    refused = httpx.post(f"{url}/api/generate", json=body)
    assert refused.status_code == 400 and "images[0]" in refused.json()["error"]


def test_create_with_a_projector(llama: ollama.Client, tmp_path: Path) -> None:
    files = {"eyes.gguf": tiny_projector(tmp_path / "eyes.gguf"), "m.gguf": tiny_model(tmp_path / "m.gguf")}
    digests = {name: llama.create_blob(str(file)) for name, file in files.items()}
    llama.create("made", files=digests)
    assert "vision" in (llama.show("made").capabilities or [])
    answer = llama.generate("made", "x", images=[CAT], options={"num_predict": 2})
    assert answer.prompt_eval_count == SEEN + 2
    with pytest.raises(ollama.ResponseError, match="not one model"):
        llama.create("eyes", files={"eyes.gguf": digests["eyes.gguf"]})
