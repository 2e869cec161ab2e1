"""The Responses API over HTTP, with a model that is scripted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted import ScriptedModel
from test_server_helpers import TickModel
from test_tools_templates import TOOLS, template

from alight.errors import EngineError
from alight.server import Models, running
from alight.server.failures import Refused
from alight.server.openai_items import messages_of
from alight.server.openai_memory import Memory

MODELS = {name: ScriptedModel(template(name)) for name in ("qwen-3", "qwen-2.5")}
FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with Models() as models:
        for name, model in MODELS.items():
            models.add(name, model)
        models.add("broken", TickModel(error=EngineError("it broke"), fail_at=3))
        with running(models) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client


def ask(client: httpx.Client, *answers: str, model: str = "qwen-2.5", **fields: Any) -> httpx.Response:
    scripted = MODELS[model]
    scripted.answers[:] = answers
    scripted.samplings.clear()
    scripted.prompts.clear()
    return client.post("/v1/responses", json={"model": model, "input": "Is it warm?", **fields})


def made(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    Response.model_validate(response.json(), strict=True)
    return dict(response.json())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for text in response.text.strip().split("\n\n"):
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def names(found: list[dict[str, Any]]) -> list[str]:
    """The types, without "response.", those in a row once."""
    short = [event["type"].removeprefix("response.") for event in found]
    return [name for i, name in enumerate(short) if i == 0 or short[i - 1] != name]


def test_text(client: httpx.Client) -> None:
    answer = made(ask(client, "Yes, it is.", max_output_tokens=50, temperature=0.5, metadata={"a": "b"}))
    assert answer["id"].startswith("resp_")
    assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
    (message,) = answer["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert message["content"] == [
        {"type": "output_text", "text": "Yes, it is.", "annotations": [], "logprobs": []}
    ]
    assert answer["usage"]["output_tokens"] == 11
    assert answer["usage"]["input_tokens_details"] == {"cached_tokens": 1, "cache_write_tokens": 0}
    assert (answer["max_output_tokens"], answer["temperature"]) == (50, 0.5)
    assert answer["metadata"] == {"a": "b"}
    assert MODELS["qwen-2.5"].samplings[0].max_tokens == 50


def test_text_in_a_stream(client: httpx.Client) -> None:
    found = events(ask(client, "Yes.", stream=True))
    assert names(found) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert found[0]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    assert found[2]["item"]["content"] == []
    assert "".join(e["delta"] for e in found if e["type"].endswith("delta")) == "Yes."
    assert found[-4]["text"] == "Yes."
    final = found[-1]["response"]
    assert final["output"] == [found[-2]["item"]]
    assert final["usage"]["total_tokens"] > 4


def test_all_kinds_of_items_in_a_stream(client: httpx.Client) -> None:
    written = f"<think>\nHm.\n</think>\n\nOne moment.{CALL}{CALL}"
    found = events(ask(client, written, model="qwen-3", tools=FUNCTIONS, stream=True))
    message = ["output_item.added", "content_part.added", "content_part.done", "output_item.done"]
    reasoning = [*message[:2], "reasoning_text.delta", "reasoning_text.done", *message[2:]]
    text = [*message[:2], "output_text.delta", "output_text.done", *message[2:]]
    call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert names(found) == ["created", "in_progress", *reasoning, *text, *call, *call, "completed"]
    final = found[-1]["response"]
    assert [item["type"] for item in final["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    for i, item in enumerate(final["output"]):
        about = [e for e in found if e.get("output_index") == i]
        assert {e.get("item_id", item["id"]) for e in about} == {item["id"]}
        assert about[-1]["item"] == item
    assert final["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert final["usage"]["output_tokens_details"]["reasoning_tokens"] >= 3
    whole = made(ask(client, written, model="qwen-3", tools=FUNCTIONS))
    strip = ("id", "call_id")
    assert [{k: v for k, v in item.items() if k not in strip} for item in whole["output"]] == [
        {k: v for k, v in item.items() if k not in strip} for item in final["output"]
    ]


def test_calls_and_their_results(client: httpx.Client) -> None:
    answer = made(ask(client, CALL, tools=FUNCTIONS))
    (call,) = answer["output"]
    assert call["name"] == "get_weather"
    assert json.loads(call["arguments"]) == {"city": "Rome"}
    assert answer["tools"][0]["name"] == "get_weather"
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "21 degrees"}
    question = {"role": "user", "content": [{"type": "input_text", "text": "Is it warm?"}]}
    for follow in (
        {"input": [question, call, result]},
        {"input": [result], "previous_response_id": answer["id"]},
    ):
        made(ask(client, "Yes.", tools=FUNCTIONS, **follow))
        (prompt,) = MODELS["qwen-2.5"].prompts
        order = [prompt.index(text) for text in ("Is it warm?", '{"city": "Rome"}', "21 degrees")]
        assert order == sorted(order)


def test_choices_of_tools(client: httpx.Client) -> None:
    (call,) = made(ask(client, 'get_time"', "{}", tools=FUNCTIONS, tool_choice="required"))["output"]
    assert (call["name"], call["arguments"]) == ("get_time", "{}")
    named = {"type": "function", "name": "get_weather"}
    (call,) = made(ask(client, "{}", tools=FUNCTIONS, tool_choice=named))["output"]
    assert call["name"] == "get_weather"


def test_a_schema(client: httpx.Client) -> None:
    form = {
        "type": "json_schema",
        "name": "x",
        "schema": {"type": "object", "properties": {}},
        "strict": True,
    }
    answer = made(ask(client, "{}", text={"format": form}))
    assert json.loads(MODELS["qwen-2.5"].samplings[0].json_schema) == form["schema"]
    assert answer["text"] == {"format": form}


@pytest.mark.parametrize("stream", [True, False])
def test_a_response_cut_short(client: httpx.Client, stream: bool) -> None:
    response = ask(client, "Yes, it is.", max_output_tokens=3, stream=stream)
    if stream:
        found = events(response)
        assert names(found)[-2:] == ["output_item.done", "incomplete"]
        answer = found[-1]["response"]
    else:
        answer = made(response)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["output"][0]["content"][0]["text"] == "Yes"
    after = ask(client, "…", input="Go on.", previous_response_id=answer["id"])
    assert made(after)["status"] == "completed"
    assert "Yes<|im_end|>" in MODELS["qwen-2.5"].prompts[0]


def test_half_a_call_is_not_gone_on_from(client: httpx.Client) -> None:
    named = {"type": "function", "name": "get_weather"}
    cut = made(ask(client, '{"city"', tools=FUNCTIONS, tool_choice=named, max_output_tokens=3))
    assert cut["output"][0]["status"] == "incomplete"
    assert ask(client, "Hm.", input="And?", previous_response_id=cut["id"]).status_code == 200


def test_logprobs(client: httpx.Client) -> None:
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    (message,) = made(ask(client, "Yes.", **options))["output"]
    told = message["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in told) == "Yes."
    assert told[0]["top_logprobs"] == [{"token": "a", "logprob": -1.0, "bytes": [97]}]
    found = events(ask(client, "Yes.", stream=True, **options))
    deltas = [e for e in found if e["type"] == "response.output_text.delta"]
    assert [entry["token"] for e in deltas for entry in e["logprobs"]] == list("Yes.")


def test_instructions_are_each_request_s_own(client: httpx.Client) -> None:
    first = made(ask(client, "One.", instructions="Be brief."))
    assert MODELS["qwen-2.5"].prompts[0].startswith("<|im_start|>system\nBe brief.")
    made(ask(client, "Two.", instructions="Be long.", previous_response_id=first["id"]))
    (prompt,) = MODELS["qwen-2.5"].prompts
    assert "Be long." in prompt and "Be brief." not in prompt
    assert prompt.count("Is it warm?") == 2


def test_responses_are_kept(client: httpx.Client) -> None:
    answer = made(ask(client, "Yes."))
    assert client.get(f"/v1/responses/{answer['id']}").json() == answer
    assert client.delete(f"/v1/responses/{answer['id']}").json()["deleted"] is True
    gone = client.get(f"/v1/responses/{answer['id']}")
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "response_not_found"
    error = ask(client, previous_response_id=answer["id"]).json()["error"]
    assert error["param"] == "previous_response_id"
    forgotten = made(ask(client, "Yes.", store=False))
    assert client.get(f"/v1/responses/{forgotten['id']}").status_code == 404


def test_the_memory_is_bounded() -> None:
    memory = Memory(most=2, most_bytes=1000)
    for id in "abc":
        memory.keep({"id": id}, [])
    with pytest.raises(Refused, match="'a'"):
        memory.find("a")
    memory.find("b")
    memory.keep({"id": "d"}, [])  # "c" was used longest ago
    assert memory.find("b").response == {"id": "b"}
    memory.keep({"id": "e", "text": "x" * 2000}, [])
    for id in "bcde":
        with pytest.raises(Refused):
            memory.find(id)


def test_items_become_messages() -> None:
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "b"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "d"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "e"}]},
        {"type": "function_call", "call_id": "3", "name": "h", "arguments": "{}"},
        {"role": "assistant", "content": "i"},
        {"role": "assistant", "content": "j"},
    ]
    said = messages_of(items)
    assert [message["role"] for message in said] == ["user", *["assistant", "tool"], *["assistant"] * 3]
    assert (said[1]["reasoning_content"], said[1]["content"]) == ("b", "c")
    assert [call["function"]["name"] for call in said[1]["tool_calls"]] == ["f", "g"]
    assert said[2] == {"role": "tool", "tool_call_id": "1", "content": "d"}
    assert said[3]["reasoning_content"] == "e" and said[3]["tool_calls"][0]["id"] == "3"
    assert [message["content"] for message in said[4:]] == ["i", "j"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": 5}, "input"),
    ({"input": []}, "messages"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
    ({"previous_response_id": "resp_x"}, "resp_x"),
    ({"background": True}, "background"),
    ({"conversation": "x"}, "conversation"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["file_search_call.results"]}, "file_search_call.results"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"type": 5}}]}, "parameters.type"),
    ({"tool_choice": "required"}, "tools"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, "text.format.schema.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    ({"text": {"form": 1}}, "text.form"),
    ({"reasoning": {"effort": "very"}}, "reasoning.effort"),
    ({"messages": []}, "messages"),
    ({"max_tokens": 5}, "max_tokens"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_named(client: httpx.Client, fields: dict[str, Any], named: str) -> None:
    response = ask(client, **fields)
    assert response.status_code in (400, 404), response.text
    assert named in response.json()["error"]["message"]


def test_an_error_in_the_middle(client: httpx.Client) -> None:
    body = {"model": "broken", "input": "x", "stream": True}
    found = events(client.post("/v1/responses", json=body))
    assert found[-1]["type"] == "error"
    assert "it broke" in found[-1]["message"]


def test_many_at_once(client: httpx.Client) -> None:
    MODELS["qwen-2.5"].answers[:] = ["same"] * 8
    found: list[str] = []

    def one() -> None:
        body = {"model": "qwen-2.5", "input": "x"}
        found.append(client.post("/v1/responses", json=body).json()["output"][0]["content"][0]["text"])

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["same"] * 8
