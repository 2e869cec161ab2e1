"""Completions: several prompts and choices, echo, log-probabilities, and filling in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from scripted import ScriptedModel
from test_server_openai import events

from alight.server import Models, ollama_insert, running
from alight.target import Sampling
from alight.testing import EchoModel

scripted = ScriptedModel("")


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with Models() as models:
        models.add("echo", EchoModel(context=512))
        models.add("scripted", scripted)
        with running(models) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client


def complete(client: httpx.Client, prompt: Any, *, model: str = "echo", **fields: Any) -> httpx.Response:
    scripted.prompts.clear()
    scripted.samplings.clear()
    return client.post("/v1/completions", json={"model": model, "prompt": prompt, **fields})


def texts(response: httpx.Response, stream: bool) -> list[str]:
    answers = events(response) if stream else [response.json()]
    found: dict[int, str] = {}
    for answer in answers:
        for choice in answer["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return [found[i] for i in range(len(found))]


@pytest.mark.parametrize("stream", [True, False])
def test_several_prompts(client: httpx.Client, stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    response = complete(client, ["ab", "c", [100]], n=2, best_of=2, stream=stream, **options)
    assert texts(response, stream) == ["ab", "ab", "c", "c", "d", "d"]
    usage = events(response)[-1]["usage"] if stream else response.json()["usage"]
    assert usage["prompt_tokens"] == 4
    assert usage["completion_tokens"] == 2 * (3 + 2 + 2)


def test_many_prompts(client: httpx.Client) -> None:
    prompts = [str(i) for i in range(128)]
    assert texts(complete(client, prompts), False) == prompts


def test_an_error_of_one_prompt(client: httpx.Client) -> None:
    response = complete(client, ["ok", "x" * 600])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [True, False])
def test_echo(client: httpx.Client, stream: bool) -> None:
    assert texts(complete(client, "ab", echo=True, stream=stream), stream) == ["abab"]
    assert texts(complete(client, [97, 98], echo=True, max_tokens=0, stream=stream), stream) == ["ab"]


def test_logprobs_of_an_echo(client: httpx.Client) -> None:
    (choice,) = complete(client, "ab", echo=True, logprobs=2, max_tokens=0).json()["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "ab"
    assert told["tokens"] == ["a", "b"]
    assert told["token_logprobs"] == [None, pytest.approx(-math.log(257))]
    assert told["top_logprobs"][0] is None
    assert len(told["top_logprobs"][1]) == 2
    assert told["text_offset"] == [0, 1]


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs(client: httpx.Client, stream: bool) -> None:
    scripted.answers[:] = ["hé!"]
    response = complete(client, "x", model="scripted", logprobs=1, stream=stream)
    answers = events(response) if stream else [response.json()]
    told = [answer["choices"][0]["logprobs"] for answer in answers]
    assert [token for one in told for token in one["tokens"]] == ["h", "é", "!"]
    assert [offset for one in told for offset in one["text_offset"]] == [0, 1, 2]
    assert told[0]["token_logprobs"][0] == -0.5
    assert told[0]["top_logprobs"][0] == {"a": -1.0}


def test_filling_in(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    response = complete(client, "a", suffix="b")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "suffix"
    monkeypatch.setattr(ollama_insert, "insert_marks", lambda artifact: (60, 61, 62))
    scripted.answers[:] = ["x"]
    response = complete(client, "before", model="scripted", suffix="after", echo=True)
    assert texts(response, False) == ["beforex"]
    assert scripted.prompts == ["<before=after>"]
    assert complete(client, [1], suffix="after").status_code == 400


def test_sampling(client: httpx.Client) -> None:
    fields = {
        "seed": 3,
        "json_schema": '{"type": "null"}',
        "keep_special": ["<x>"],
        "typical_p": 0.5,
        "stop": "y",
    }
    complete(client, "x", model="scripted", n=2, **fields)
    expected = [
        Sampling(seed=seed, json_schema='{"type": "null"}', keep_special=("<x>",), typical_p=0.5, stop=("y",))
        for seed in (3, 4)
    ]
    assert sorted(scripted.samplings, key=lambda s: s.seed or 0) == expected


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": '{"type": "strnig"}'}, "json_schema.type"),
        ({"json_schema": "{}", "grammar": "x"}, "grammar"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"prompt": ["a"] * 40, "n": 8}, "40 prompts"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_is_named(client: httpx.Client, fields: dict[str, Any], named: str) -> None:
    response = complete(client, **({"prompt": "x"} | fields))
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]
