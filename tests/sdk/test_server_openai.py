"""The OpenAI API over a real connection, with a model that echoes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from test_server_helpers import TickModel

from alight.lan.client import connect
from alight.server import Models, running
from alight.target import Sampling
from alight.testing import EchoModel

tick = TickModel(ticks=2)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Models() as models:
        models.add("echo", EchoModel(context=512))
        models.add("tick", tick)
        with running(models) as url:
            yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


def ask(content: Any = "héllo", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": content}], **fields}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done = [line for line in response.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def counted(usage: dict[str, Any]) -> tuple[int, int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]


def test_models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]] == ["echo", "tick"]
    one = client.get("/v1/models/echo:latest").json()
    assert one == {"id": "echo", "object": "model", "created": 0, "owned_by": "alight", "loaded": True}
    missing = client.get("/v1/models/some/ecko")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_chat(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=ask()).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "echo"
    assert isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "héllo"
    assert choice["finish_reason"] == "stop"
    assert counted(answer["usage"]) == (6, 7, 13)


@pytest.mark.parametrize("wants_usage", [True, False])
def test_chat_stream(client: httpx.Client, wants_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if wants_usage else {}
    all_events = events(client.post("/v1/chat/completions", json=ask(stream=True, **options)))
    assert len({event["id"] for event in all_events}) == 1
    assert {event["object"] for event in all_events} == {"chat.completion.chunk"}
    if wants_usage:
        *all_events, last = all_events
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == 13
        assert all(event["usage"] is None for event in all_events)
    else:
        assert all("usage" not in event for event in all_events)
    choices = [event["choices"][0] for event in all_events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for c in choices) == "héllo"
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [104, 105], [[104, 105]]])
@pytest.mark.parametrize("stream", [True, False])
def test_completions(client: httpx.Client, prompt: Any, stream: bool) -> None:
    response = client.post("/v1/completions", json={"model": "echo", "prompt": prompt, "stream": stream})
    answers = events(response) if stream else [response.json()]
    assert {answer["object"] for answer in answers} == {"text_completion"}
    assert "".join(answer["choices"][0]["text"] for answer in answers) == "hi"
    assert answers[-1]["choices"][0]["finish_reason"] == "stop"
    if not stream:
        assert counted(answers[0]["usage"]) == (2, 3, 5)


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_token_limit(client: httpx.Client, limit: str) -> None:
    choice = client.post("/v1/chat/completions", json=ask("abcdef", **{limit: 3})).json()["choices"][0]
    assert choice["message"]["content"] == "abc"
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["cd", ["x", "cd"]])
def test_stop(client: httpx.Client, stop: Any) -> None:
    choice = client.post("/v1/chat/completions", json=ask("abcdef", stop=stop)).json()["choices"][0]
    assert choice["message"]["content"] == "ab"
    assert choice["finish_reason"] == "stop"


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


SAMPLINGS: list[tuple[dict[str, Any], Sampling]] = [
    ({}, Sampling()),
    ({"temperature": None, "stop": None, "stream": None, "seed": None, "max_tokens": None}, Sampling()),
    ({"temperature": 0, "top_p": 0.5, "seed": 7}, Sampling(temperature=0, top_p=0.5, seed=7)),
    ({"presence_penalty": 1, "frequency_penalty": -1}, Sampling(presence_penalty=1, frequency_penalty=-1)),
    ({"top_k": -1, "min_p": 0.1, "repeat_penalty": 1.1}, Sampling(top_k=0, min_p=0.1, repeat_penalty=1.1)),
    ({"repeat_last_n": -1, "max_tokens": 9}, Sampling(repeat_last_n=-1, max_tokens=9)),
    ({"seed": -1}, Sampling(seed=2**32 - 2)),
    ({"seed": 2**63}, Sampling(seed=2**63 % (2**32 - 1))),
    ({"max_tokens": 9, "max_completion_tokens": 8, "stop": ["a"]}, Sampling(max_tokens=8, stop=("a",))),
    ({"logprobs": True, "top_logprobs": 2}, Sampling(logprobs=2)),
    ({"logprobs": True}, Sampling(logprobs=0)),
    ({"logit_bias": {"5": -100, "6": 0.5}}, Sampling(logit_bias=((5, -100.0), (6, 0.5)))),
    ({"logit_bias": [[5, 1]]}, Sampling(logit_bias=((5, 1.0),))),
    ({"response_format": {"type": "json_object"}}, Sampling(json_schema="{}")),
    ({"response_format": schema({"type": "null"})}, Sampling(json_schema='{"type": "null"}')),
    ({"grammar": 'root ::= "a"'}, Sampling(grammar='root ::= "a"')),
    ({"mirostat": 2, "dry_sequence_breakers": ["x"]}, Sampling(mirostat=2, dry_sequence_breakers=("x",))),
    ({"adapters": [["pirate", 0.5]]}, Sampling(adapters=(("pirate", 0.5),))),
    ({"reasoning_effort": "low", "n": 1}, Sampling()),
]


@pytest.mark.parametrize(("fields", "sampling"), SAMPLINGS)
def test_sampling(client: httpx.Client, fields: dict[str, Any], sampling: Sampling) -> None:
    assert client.post("/v1/chat/completions", json=ask(model="tick", **fields)).status_code == 200
    assert tick.sampling == sampling


HARMLESS: dict[str, Any] = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "parallel_tool_calls": False,
    "n": 1,
    "tools": [],
    "tool_choice": "none",
    "logprobs": False,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": None,
}


def test_fields_that_ask_for_nothing(client: httpx.Client) -> None:
    assert client.post("/v1/chat/completions", json=ask(**HARMLESS)).status_code == 200


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [function(parameters={"type": "obiect"})]}, "tools[0].function.parameters.type"),
    ({"tool_choice": "required"}, "tools"),
    ({"tools": [function()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": schema({"type": "strnig"})}, "response_format.json_schema.schema.type"),
    (
        {"response_format": schema({"properties": {"age": {"type": "int"}}})},
        "response_format.json_schema.schema.properties.age.type",
    ),
    ({"logprobs": 0}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"257": 1}}, "logit_bias"),
    ({"logit_bias": [[1]]}, "logit_bias"),
    ({"reasoning_effort": "very"}, "reasoning_effort"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"temprature": 1}, "temprature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_all": True}}, "include_all"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_done_is_refused_by_name(
    client: httpx.Client, fields: dict[str, Any], named: str, stream: bool
) -> None:
    response = client.post("/v1/chat/completions", json={**ask(stream=stream), **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert named in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


BAD_PROMPTS: list[tuple[Any, str]] = [
    (["a", 5], "prompt"),
    (["a"] * 129, "129"),
    ({}, "prompt"),
    (None, "prompt"),
    ([1.5], "prompt"),
    ([True], "prompt"),
    ("", "empty"),
    ([], "empty"),
    ([999], "999"),
    ([-1], "-1"),
    ("x" * 600, "512"),
]


@pytest.mark.parametrize(("prompt", "named"), BAD_PROMPTS, ids=lambda value: str(value)[:12])
def test_bad_prompts(client: httpx.Client, prompt: Any, named: str) -> None:
    response = client.post("/v1/completions", json={"model": "echo", "prompt": prompt})
    assert response.status_code == 400, response.text
    assert named in response.json()["error"]["message"]


def test_context_exceeded(client: httpx.Client) -> None:
    error = client.post("/v1/chat/completions", json=ask("x" * 600, stream=True)).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_wrong_model(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=ask(model="ecko"))
    assert response.status_code == 404
    assert "Did you mean echo" in response.json()["error"]["message"]


BROKEN = [
    b"",
    b"{",
    b"[]",
    b'"x"',
    b'{"model": "echo", "messages": NaN}',
    b"[" * 100_000,
    b'{"model": "\\ud800"}',
    b"\xff",
]


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: repr(body[:12]))
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate", "/api/show"]
)
def test_broken_bodies(client: httpx.Client, path: str, body: bytes) -> None:
    response = client.post(path, content=body)
    assert response.status_code == 400
    assert "error" in response.json()


def test_unknown_paths(client: httpx.Client) -> None:
    for path in ("/v1/nothing", "/v1/chat/completions"):
        error = client.get(path).json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
    assert client.get("/v1/chat/completions").status_code == 405


def test_line_separators_inside_an_answer(url: str, client: httpx.Client) -> None:
    text = "a\u2028b\x85c\u2029d\x0be\r\nf 👩‍🚀 你好"
    pieces = events(client.post("/v1/chat/completions", json=ask(text, stream=True)))
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == text
    with connect(url) as server:
        assert str(server.chat([{"role": "user", "content": text}], "echo")) == text


def test_our_own_client(url: str) -> None:
    with connect(url) as server:
        assert server.models() == ["echo", "tick"]
        answer = server.chat([{"role": "user", "content": "héllo"}], "echo", temperature=0, stop=("l",))
        assert str(answer) == "hé"
        assert server.model("echo").complete([104, 105], max_tokens=1).finish_reason == "length"
