"""Chat with tools, reasoning, log-probabilities and several choices, over HTTP, with a model that is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import ScriptedModel
from test_server_helpers import TickModel, wait_until
from test_server_openai import events
from test_tools_templates import TOOLS, template

from alight.artifact import Artifact, Description
from alight.errors import EngineError
from alight.preset import Preset
from alight.server import Models, running
from alight.target import LoadOptions

MODELS = {name: ScriptedModel(template(name)) for name in ("qwen-3", "qwen-2.5", "llama-3.2")}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TIME = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with Models() as models:
        for name, model in MODELS.items():
            models.add(name, model)
        with running(models) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client


def ask(client: httpx.Client, *answers: str, model: str = "qwen-2.5", **fields: Any) -> httpx.Response:
    scripted = MODELS[model]
    scripted.answers[:] = answers
    scripted.samplings.clear()
    scripted.prompts.clear()
    body = {"model": model, "messages": [{"role": "user", "content": "Is it warm in Rome?"}], **fields}
    return client.post("/v1/chat/completions", json=body)


def choice(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    (only,) = response.json()["choices"]
    return dict(only)


def pieces(response: httpx.Response, index: int = 0) -> list[dict[str, Any]]:
    return [c for event in events(response) for c in event["choices"] if c["index"] == index]


def test_calls(client: httpx.Client) -> None:
    made = choice(ask(client, f"One moment.\n{CALL}\n{TIME}", tools=TOOLS))
    assert made["finish_reason"] == "tool_calls"
    message = made["message"]
    assert message["content"] == "One moment."
    first, second = message["tool_calls"]
    assert first["type"] == "function" and first["id"] != second["id"]
    assert first["function"]["name"] == "get_weather"
    assert json.loads(first["function"]["arguments"]) == {"city": "Rome"}
    assert second["function"] == {"name": "get_time", "arguments": "{}"}
    assert choice(ask(client, CALL, tools=TOOLS))["message"]["content"] is None


def test_calls_in_a_stream(client: httpx.Client) -> None:
    made = pieces(ask(client, f"One moment.\n{CALL}\n{TIME}", tools=TOOLS, stream=True))
    assert "".join(p["delta"].get("content", "") for p in made) == "One moment."
    calls: dict[int, dict[str, str]] = {}
    for piece in made:
        for call in piece["delta"].get("tool_calls", []):
            kept = calls.setdefault(call["index"], {"arguments": ""})
            kept["arguments"] += call["function"]["arguments"]
            if "id" in call:
                kept |= {"name": call["function"]["name"], "id": call["id"], "type": call["type"]}
    assert [calls[0]["name"], calls[1]["name"]] == ["get_weather", "get_time"]
    assert json.loads(calls[0]["arguments"]) == {"city": "Rome"}
    assert [p["finish_reason"] for p in made] == [None] * (len(made) - 1) + ["tool_calls"]
    assert not any("<tool" in json.dumps(piece) for piece in made)


def test_one_call_at_most(client: httpx.Client) -> None:
    made = choice(ask(client, CALL + TIME, tools=TOOLS, parallel_tool_calls=False))
    assert len(made["message"]["tool_calls"]) == 1


def test_what_is_no_call_is_text(client: httpx.Client) -> None:
    made = choice(ask(client, "<tool_call>oops</tool_call>", tools=TOOLS))
    assert made["message"]["content"] == "oops"
    assert "tool_calls" not in made["message"]
    assert made["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_that_is_required(client: httpx.Client, stream: bool) -> None:
    response = ask(
        client, 'get_weather"', '{"city": "Rome"}', tools=TOOLS, tool_choice="required", stream=stream
    )
    if stream:
        deltas = [c for p in pieces(response) for c in p["delta"].get("tool_calls", [])]
        assert deltas[0]["function"] == {"name": "get_weather", "arguments": ""}
        assert len(deltas) > 10, "the arguments of a call that is certain stream"
        arguments = "".join(call["function"]["arguments"] for call in deltas)
    else:
        (call,) = choice(response)["message"]["tool_calls"]
        arguments = call["function"]["arguments"]
        assert response.json()["usage"]["completion_tokens"] == len('get_weather"') + len(arguments)
    assert json.loads(arguments) == {"city": "Rome"}


def test_a_call_that_is_named(client: httpx.Client) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    made = choice(ask(client, "{}", tools=TOOLS, tool_choice=named, model="llama-3.2"))
    assert made["message"]["tool_calls"][0]["function"] == {"name": "get_time", "arguments": "{}"}
    assert MODELS["llama-3.2"].prompts[0].endswith('{"name": "get_time", "parameters": ')


def test_a_call_cut_short(client: httpx.Client) -> None:
    made = choice(ask(client, CALL, tools=TOOLS, max_tokens=30))
    assert made["finish_reason"] == "length"
    assert made["message"]["content"] == CALL[len("<tool_call>") : 30]


def test_results_go_back(client: httpx.Client) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}]
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "noon"}]},
    ]
    assert choice(ask(client, "Noon.", messages=messages, tools=TOOLS))["message"]["content"] == "Noon."
    assert "<tool_response>\nnoon\n</tool_response>" in MODELS["qwen-2.5"].prompts[0]


@pytest.mark.parametrize("stream", [True, False])
def test_reasoning(client: httpx.Client, stream: bool) -> None:
    response = ask(client, "<think>\nHm.\n</think>\n\nYes.", model="qwen-3", stream=stream)
    if stream:
        deltas = [piece["delta"] for piece in pieces(response)]
        told = {key: "".join(d.get(key, "") for d in deltas) for key in ("content", "reasoning_content")}
    else:
        told = choice(response)["message"]
    assert (told["reasoning_content"], told["content"]) == ("Hm.", "Yes.")


def test_efforts(client: httpx.Client) -> None:
    for effort, thinks in (("none", False), ("minimal", False), ("low", True), (None, True)):
        ask(client, "Yes.", model="qwen-3", reasoning_effort=effort)
        assert MODELS["qwen-3"].prompts[0].endswith("</think>\n\n") != thinks
    assert choice(ask(client, "Yes.", reasoning_effort="high"))["message"]["content"] == "Yes."


def test_a_schema(client: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    made = choice(ask(client, '{"warm": true}', model="qwen-3", response_format=form))
    assert json.loads(made["message"]["content"]) == {"warm": True}
    assert json.loads(MODELS["qwen-3"].samplings[0].json_schema) == schema
    assert MODELS["qwen-3"].samplings[0].keep_special == ("<think>", "</think>")


def test_a_schema_and_a_grammar(client: httpx.Client) -> None:
    response = ask(client, "{}", response_format={"type": "json_object"}, grammar='root ::= "x"')
    assert response.status_code == 400
    assert "grammar" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_several_choices(client: httpx.Client, stream: bool) -> None:
    texts = ["first", CALL, "the third"]
    options = {"stream_options": {"include_usage": True}} if stream else {}
    response = ask(client, *texts, tools=TOOLS, n=3, seed=5, stream=stream, **options)
    if stream:
        found = []
        for index in range(3):
            made = pieces(response, index)
            assert made[0]["delta"]["role"] == "assistant"
            called = any("tool_calls" in p["delta"] for p in made)
            found.append(CALL if called else "".join(p["delta"].get("content", "") for p in made))
            assert [bool(p["finish_reason"]) for p in made] == [False] * (len(made) - 1) + [True]
        usage = events(response)[-1]["usage"]
    else:
        choices = response.json()["choices"]
        assert [c["index"] for c in choices] == [0, 1, 2]
        found = [c["message"]["content"] or CALL for c in choices]
        usage = response.json()["usage"]
    assert sorted(found) == sorted(texts)
    assert sorted(s.seed or 0 for s in MODELS["qwen-2.5"].samplings) == [5, 6, 7]
    assert usage["completion_tokens"] == sum(map(len, texts))
    assert usage["prompt_tokens"] == len(MODELS["qwen-2.5"].prompts[0])
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}


def test_an_error_of_several_choices(client: httpx.Client) -> None:
    response = ask(client, n=3, messages=[{"role": "robot", "content": ""}])
    assert response.status_code == 400
    assert "messages[0].role" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs(client: httpx.Client, stream: bool) -> None:
    response = ask(client, "Yes" + CALL, tools=TOOLS, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        told = [entry for p in pieces(response) if p["logprobs"] for entry in p["logprobs"]["content"]]
    else:
        told = choice(response)["logprobs"]["content"]
    assert "".join(entry["token"] for entry in told) == "Yes" + CALL
    assert told[0] == {
        "token": "Y",
        "logprob": -0.5,
        "bytes": [89],
        "top_logprobs": [
            {"token": "a", "logprob": -1.0, "bytes": [97]},
            {"token": "b", "logprob": -2.0, "bytes": [98]},
        ],
    }
    assert choice(ask(client, "Yes"))["logprobs"] is None


def test_messages_that_are_wrong_are_named(client: httpx.Client) -> None:
    bad = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    response = ask(client, messages=bad)
    assert response.status_code == 400
    assert "messages[0].tool_calls[0].function.arguments" in response.json()["error"]["message"]


def test_the_field_to_blame(client: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}
    form = {"type": "json_schema", "json_schema": {"schema": {"items": 5}}}
    for fields, param in (({"tools": [tool]}, "tools"), ({"response_format": form}, "response_format")):
        error = ask(client, **fields).json()["error"]
        assert error["param"] == param
        assert error["code"] == "invalid_request"


def test_what_a_model_brings_along(tmp_path: Path) -> None:
    """A system text, a template and parameters, as Ollama's `create` sets them."""
    preset = Preset(
        system="You are Mario.",
        template="{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}",
        parameters={"temperature": 0.25, "top_k": 7, "num_predict": 9, "stop": ["x"]},
    )
    (tmp_path / "preset.json").write_bytes(preset.to_bytes())
    model = ScriptedModel(template("qwen-2.5"))
    with Models() as models:
        artifact = Artifact("mario", "", Description("gguf"), (), {"preset.json": tmp_path / "preset.json"})
        models.add("mario", model, artifact)
        with running(models) as url:
            body = {"model": "mario", "messages": [{"role": "user", "content": "Hi"}], "top_k": 3}
            assert httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False).status_code == 200
            body = {"model": "mario", "input": "Hi"}
            told = httpx.post(f"{url}/v1/responses", json=body, trust_env=False).json()
            body = {"model": "mario", "prompt": "Hi", "temperature": 0.5}
            assert httpx.post(f"{url}/v1/completions", json=body, trust_env=False).status_code == 200
    assert model.prompts[0] == model.prompts[1] == "[system] You are Mario. [user] Hi "
    assert model.prompts[2] == "Hi"
    first, second, third = model.samplings
    assert (first.temperature, first.top_k, first.max_tokens, first.stop) == (0.25, 3, 9, ("x",))
    assert (second.top_k, third.temperature, third.top_k) == (7, 0.5, 7)
    assert told["temperature"] == 0.25


ASK = {"messages": [{"role": "user", "content": "x"}], "n": 3}


def test_choices_that_have_to_wait_for_each_other() -> None:
    """A model with one slot makes them one after the other, and more of each than a client may lag behind."""
    tick = TickModel(ticks=400, pause=0)
    with Models(options=LoadOptions(slots=1)) as models:
        models.add("tick", tick)
        with running(models) as url:
            for stream in (False, True):
                body = {"model": "tick", "stream": stream, **ASK}
                response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
                if stream:
                    found = [len(pieces(response, index)) for index in range(3)]
                    assert found == [402] * 3
                else:
                    texts = [c["message"]["content"] for c in response.json()["choices"]]
                    assert texts == ["tick " * 400] * 3
    assert tick.begun == 6


@pytest.mark.parametrize("stream", [True, False])
def test_all_choices_end_when_the_client_leaves(stream: bool) -> None:
    tick = TickModel()
    with Models() as models:
        models.add("tick", tick)
        with running(models) as url, httpx.Client(base_url=url, trust_env=False) as client:
            body = {"model": "tick", "stream": stream, **ASK}
            if stream:
                with client.stream("POST", "/v1/chat/completions", json=body, timeout=60) as response:
                    lines = response.iter_lines()
                    for _ in range(20):
                        next(lines)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/chat/completions", json=body, timeout=1)
            wait_until(lambda: tick.begun == tick.cancelled == 3)


def test_one_choice_that_fails_ends_the_others() -> None:
    tick = TickModel(error=EngineError("it broke"), fail_at=5)
    with Models() as models:
        models.add("tick", tick)
        with running(models) as url:
            body = {"model": "tick", "stream": True, **ASK}
            response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
            assert "it broke" in response.text
            body["stream"] = False
            response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
            assert response.status_code == 500
