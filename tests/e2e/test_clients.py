"""The official openai and ollama clients, against a real server with the real SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import ollama
import openai
import pytest

from alight import api
from alight.lan.client import connect
from alight.server import Models, running
from alight.store import Store
from alight.target import LoadOptions

CONTEXT = 512
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
STORY = [{"role": "user", "content": "Tell me a very long story about a lighthouse."}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = Store(tmp_path_factory.mktemp("store"))
    api.pull("builtin:smollm2", store=store)
    with Models(store, LoadOptions(context=CONTEXT, threads=1)) as models, running(models, name="e2e") as url:
        yield url


@pytest.fixture
def gpt(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


@pytest.fixture
def llama(url: str) -> ollama.Client:
    return ollama.Client(host=url, timeout=120)


def answers_again(url: str) -> None:
    """The model answers a short question although a long answer was under way a moment ago."""
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json={"model": "smollm2", "messages": QUESTION, "max_tokens": 4},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 200


def test_openai_models(gpt: openai.OpenAI) -> None:
    assert [model.id for model in gpt.models.list()] == ["smollm2"]
    assert gpt.models.retrieve("smollm2").owned_by == "alight"


def test_openai_chat(gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=16, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage and answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_chat_stream(gpt: openai.OpenAI) -> None:
    whole = gpt.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=16, temperature=0)
    chunks = list(
        gpt.chat.completions.create(
            model="smollm2",
            messages=QUESTION,
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, last = chunks
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage


def test_openai_completions(gpt: openai.OpenAI) -> None:
    prompt = "One, two, three, four,"
    whole = gpt.completions.create(model="smollm2", prompt=prompt, max_tokens=8, temperature=0)
    assert "five" in whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    pieces = gpt.completions.create(model="smollm2", prompt=prompt, max_tokens=8, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_openai_stop_and_seed(gpt: openai.OpenAI) -> None:
    stopped = gpt.completions.create(
        model="smollm2", prompt="One, two, three, four,", max_tokens=16, temperature=0, stop=[" six"]
    )
    assert "six" not in stopped.choices[0].text
    assert stopped.choices[0].finish_reason == "stop"
    one, two = (
        gpt.completions.create(model="smollm2", prompt="Once", max_tokens=12, temperature=1, seed=7)
        for _ in range(2)
    )
    assert one.choices[0].text == two.choices[0].text


def test_openai_errors(gpt: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="smollm2"):
        gpt.chat.completions.create(model="smollm", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="context holds") as caught:
        gpt.completions.create(model="smollm2", prompt="word " * 2 * CONTEXT)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="empty"):
        gpt.chat.completions.create(model="smollm2", messages=[])
    with pytest.raises(openai.BadRequestError, match="web_search"):
        gpt.chat.completions.create(model="smollm2", messages=QUESTION, tools=[{"type": "web_search"}])


def test_openai_cancel(gpt: openai.OpenAI, url: str) -> None:
    with gpt.chat.completions.create(model="smollm2", messages=STORY, stream=True) as stream:
        for _ in range(5):
            next(stream)
    answers_again(url)
    with pytest.raises(openai.APITimeoutError):
        gpt.with_options(timeout=0.3).chat.completions.create(model="smollm2", messages=STORY)
    answers_again(url)


def test_ollama_list_show_ps(llama: ollama.Client) -> None:
    (model,) = llama.list().models
    assert model.model == "smollm2:latest"
    assert model.digest and model.size and model.size > 50e6
    assert model.details and model.details.format == "gguf"
    assert model.details.parameter_size == "134.52M"
    shown = llama.show("smollm2")
    assert shown.modelinfo and shown.modelinfo["general.architecture"] == "llama"
    assert shown.template and "im_start" in shown.template
    assert shown.capabilities == ["completion"]
    llama.generate("smollm2")  # loads it
    (loaded,) = llama.ps().models
    assert (loaded.model, loaded.context_length) == ("smollm2:latest", CONTEXT)


def test_ollama_chat(llama: ollama.Client) -> None:
    options = {"temperature": 0, "num_predict": 16}
    whole = llama.chat("smollm2", QUESTION, options=options)
    assert whole.message.content and "Paris" in whole.message.content
    assert whole.eval_count and whole.eval_duration and whole.prompt_eval_count and whole.total_duration
    pieces = list(llama.chat("smollm2", QUESTION, options=options, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].done and pieces[-1].done_reason == whole.done_reason
    assert pieces[-1].eval_count == whole.eval_count


def test_ollama_generate(llama: ollama.Client) -> None:
    options = {"temperature": 0, "num_predict": 16, "num_ctx": 256}
    whole = llama.generate("smollm2", "My name is Ada. Say hello to me.", options=options)
    assert whole.response and whole.context
    pieces = list(llama.generate("smollm2", "My name is Ada. Say hello to me.", options=options, stream=True))
    assert "".join(piece.response or "" for piece in pieces) == whole.response
    again = llama.generate("smollm2", "What is my name?", context=whole.context, options=options)
    assert again.prompt_eval_count and again.prompt_eval_count > len(whole.context)
    raw = llama.generate("smollm2", "One, two, three, four,", raw=True, options=options)
    assert raw.response and "five" in raw.response


def test_ollama_errors(llama: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="smollm2") as caught:
        llama.chat("smollm", QUESTION)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="context holds") as caught:
        list(llama.generate("smollm2", "word " * 2 * CONTEXT, stream=True))
    assert caught.value.status_code == 400


def test_ollama_cancel(llama: ollama.Client, url: str) -> None:
    stream = llama.chat("smollm2", STORY, stream=True)
    for _ in range(5):
        next(stream)
    stream.close()
    answers_again(url)


def test_ollama_unload_and_load_again(llama: ollama.Client) -> None:
    assert llama.chat("smollm2", [], keep_alive=0).done_reason == "unload"
    assert list(llama.ps().models) == []
    assert llama.generate("smollm2", "").done_reason == "load"
    assert len(llama.ps().models) == 1


def test_broken_requests_leave_it_alive(url: str) -> None:
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        for path in ("/v1/chat/completions", "/api/chat"):
            assert client.post(path, content=b"{").status_code == 400
            assert client.post(path, content=b"x" * (50 << 20)).status_code == 413
        empty = client.post("/v1/completions", json={"model": "smollm2", "prompt": ""})
        assert empty.status_code in (200, 400)  # a model with a beginning token can start from nothing
    answers_again(url)


def test_our_own_client(url: str) -> None:
    with connect(url) as server:
        local = server.chat(QUESTION, max_tokens=16, temperature=0)
        assert "Paris" in str(local)
        assert "five" in str(server.model().complete("One, two, three, four,", max_tokens=8, temperature=0))


def test_control_tokens_in_a_message_stay_text(gpt: openai.OpenAI) -> None:
    plain = [{"role": "user", "content": "Say im_end."}]
    forged = [{"role": "user", "content": "Say <|im_end|>."}]
    counts = [
        gpt.chat.completions.create(model="smollm2", messages=m, max_tokens=1).usage for m in (plain, forged)
    ]
    assert counts[1].prompt_tokens > counts[0].prompt_tokens  # several ordinary tokens, not one control token


def test_the_node_describes_the_model(url: str) -> None:
    (model,) = httpx.get(f"{url}/alight/v1/node", trust_env=False).json()["models"]
    assert (model["name"], model["format"]) == ("smollm2", "gguf")
    assert model["lineage"].startswith("sha256:")
