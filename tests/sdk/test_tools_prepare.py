"""What a prepared conversation asks of the engine: constraints, steps, and control tokens to be shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted import ScriptedModel
from test_tools_templates import FAMILIES, GENERIC, MESSAGES, TOOLS, template

from alight.errors import BadInput, EngineError, Unsupported
from alight.target import Completion, Sampling
from alight.tools import Answer, prepare_chat

ASK = [{"role": "user", "content": "Is it warm in Rome?"}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
WEATHER = TOOLS[0]["function"]["parameters"]
ANSWER = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "null"}}}


def run(model: ScriptedModel, sampling: Sampling | None = None, **options: Any) -> tuple[Answer, Completion]:
    prepared = prepare_chat(model, ASK, **options)
    chunks, deltas = [], []
    for chunk in prepared.generate(model, sampling or Sampling()):
        chunks.append(chunk)
        deltas += prepared.parser.feed(chunk.text)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return Answer.of(deltas + prepared.parser.finish()), Completion.of(chunks)


def made_call(answer: Answer) -> tuple[str, Any]:
    (call,) = answer.calls
    assert answer.text == ""
    return call.name, json.loads(call.arguments)


STARTS = {
    "deepseek-r1": ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n"),
    "deepseek-v3.1": ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
    "gemma-2": ('{"name": "', '", "arguments": '),
    "hermes-3": ('<tool_call>\n{"name": "', '", "arguments": '),
    "llama-3.1": ('{"name": "', '", "parameters": '),
    "ministral-3": ("[TOOL_CALLS]", "[ARGS]"),
    "mistral-nemo": ('[TOOL_CALLS][{"name": "', '", "arguments": '),
    "qwen-3.5": ('<tool_call>\n{"name": "', '", "arguments": '),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_named_function_is_begun_by_the_prompt(name: str) -> None:
    model = ScriptedModel(template(name), '{"city": "Rome"}')
    answer, whole = run(
        model, Sampling(seed=3), tools=TOOLS, tool_choice=NAMED, think=False if name == "qwen-3.5" else None
    )
    start, middle = STARTS[name]
    assert model.prompts[-1].endswith(start + "get_weather" + middle)
    assert json.loads(model.samplings[-1].json_schema) == WEATHER
    assert model.samplings[-1].seed == 3
    assert made_call(answer) == ("get_weather", {"city": "Rome"})
    assert whole.finish_reason == "stop"


@pytest.mark.parametrize("name", STARTS)
def test_a_required_call_is_chosen_by_a_grammar(name: str) -> None:
    end = {"deepseek-r1": "\n", "deepseek-v3.1": "<｜tool▁sep｜>", "ministral-3": "[ARGS]"}.get(name, '"')
    model = ScriptedModel(template(name), f"get_time{end}", "{}")
    think = False if name == "qwen-3.5" else None
    answer, whole = run(model, Sampling(stop=("e",)), tools=TOOLS, tool_choice="required", think=think)
    choosing, writing = model.samplings
    assert choosing.grammar == f"root ::= {json.dumps('get_weather' + end)} | {json.dumps('get_time' + end)}"
    assert (choosing.stop, choosing.json_schema) == ((), "")
    assert (writing.stop, writing.grammar) == (("e",), "")
    start, middle = STARTS[name]
    assert model.prompts[0].endswith(start)
    assert model.prompts[1] == model.prompts[0] + "get_time" + middle
    assert made_call(answer) == ("get_time", {})
    assert whole.usage.completion_tokens == len("get_time") + len(end) + 2
    assert whole.usage.prompt_tokens == len(model.prompts[0].encode())
    assert len(whole.tokens) == whole.usage.completion_tokens


def test_the_only_function_needs_no_choice() -> None:
    model = ScriptedModel(template("qwen-2.5"), "{}")
    answer, _ = run(model, tools=TOOLS[1:], tool_choice="required")
    assert made_call(answer) == ("get_time", {})
    assert len(model.prompts) == 1


def test_the_token_limit_holds_over_all_steps() -> None:
    answers = ('get_weather"', '{"city": "Rome"}')
    model = ScriptedModel(template("qwen-2.5"), *answers)
    answer, whole = run(model, Sampling(max_tokens=20), tools=TOOLS, tool_choice="required")
    assert model.samplings[1].max_tokens == 20 - len(answers[0])
    assert whole.finish_reason == "length"
    assert whole.usage.completion_tokens == 20
    assert answer.calls[0].arguments == answers[1][: 20 - len(answers[0])]
    for limit in (0, 5, len(answers[0])):
        model = ScriptedModel(template("qwen-2.5"), *answers)
        answer, whole = run(model, Sampling(max_tokens=limit), tools=TOOLS, tool_choice="required")
        assert (answer, whole.finish_reason) == (Answer(), "length")
        assert len(model.prompts) == 1


def test_an_engine_that_ignores_the_grammar_is_an_error() -> None:
    with pytest.raises(EngineError, match="nonsense"):
        run(ScriptedModel(template("qwen-2.5"), "nonsense"), tools=TOOLS, tool_choice="required")


def test_a_stream_that_is_closed_closes_its_step() -> None:
    model = ScriptedModel(template("qwen-2.5"), 'get_time"', "{}")
    stream = prepare_chat(model, ASK, tools=TOOLS, tool_choice="required").generate(model, Sampling())
    next(stream)
    stream.close()
    assert len(model.prompts) == 1


def test_reasoning_comes_before_what_a_schema_holds() -> None:
    model = ScriptedModel(template("qwen-3.5"), "Hm.\n</think>not seen", '{"warm": true}')
    answer, whole = run(model, Sampling(stop=("x",)), json_schema=json.dumps(ANSWER))
    assert answer == Answer('{"warm": true}', "Hm.")
    free, bound = model.samplings
    assert (free.stop, free.json_schema) == (("</think>",), "")
    assert (bound.stop, json.loads(bound.json_schema)) == (("x",), ANSWER)
    assert model.prompts[1] == model.prompts[0] + "Hm.\n</think>\n\n"
    assert whole.usage.prompt_seconds == 1.0


def test_reasoning_before_a_call() -> None:
    model = ScriptedModel(template("qwen-3"), "Hm.</think>", "{}")
    answer, _ = run(model, tools=TOOLS[1:], tool_choice="required", think=True)
    assert made_call(Answer(answer.text, "", answer.calls)) == ("get_time", {})
    assert answer.reasoning == "Hm."
    assert model.prompts[0].endswith("assistant\n<think>\n")


def test_reasoning_that_uses_up_the_tokens() -> None:
    model = ScriptedModel(template("qwen-3.5"), "Hm and so on", "{}")
    answer, whole = run(model, Sampling(max_tokens=4), json_schema="{}")
    assert answer == Answer("", "Hm a")
    assert whole.finish_reason == "length"


def test_a_model_that_may_reason_does_not_where_a_schema_leaves_no_room() -> None:
    model = ScriptedModel(template("qwen-3"), "{}")
    answer, _ = run(model, json_schema="{}")
    assert answer.text == "{}"
    assert model.prompts[0].endswith("<think>\n\n</think>\n\n")
    assert model.samplings[0].json_schema == "{}"


def test_tools_of_a_template_that_knows_none_are_held_by_a_schema() -> None:
    model = ScriptedModel(GENERIC, '{"response": "Yes."}')
    answer, _ = run(model, tools=TOOLS)
    assert answer.text == "Yes."
    schema = json.loads(model.samplings[0].json_schema)
    weather, time, words = schema["anyOf"]
    assert weather["properties"]["name"] == {"const": "get_weather"}
    assert schema["$defs"]["arguments0"] == WEATHER
    assert time["properties"]["arguments"] == {"$ref": "#/$defs/arguments1"}
    assert words["properties"] == {"response": {"type": "string"}}


@pytest.mark.parametrize("name", ["qwen-2.5", "generic"])
def test_a_schema_together_with_tools(name: str) -> None:
    model = ScriptedModel(GENERIC if name == "generic" else template(name), '{"response": {"next": null}}')
    answer, _ = run(model, tools=TOOLS, json_schema=json.dumps(ANSWER))
    assert json.loads(answer.text) == {"next": None}
    schema = json.loads(model.samplings[0].json_schema)
    assert schema["anyOf"][2]["properties"]["response"] == {"$ref": "#/$defs/response"}
    moved = schema["$defs"]["response"]
    assert moved["properties"]["next"] == {"$ref": "#/$defs/response/$defs/n"}
    assert moved["$defs"] == ANSWER["$defs"]


def test_references_are_moved_but_data_is_not() -> None:
    data = {"$ref": "#/x"}
    parameters = {
        "properties": {
            "enum": {"$ref": "#"},
            "default": {"anyOf": [{"$ref": "#/properties/enum"}], "enum": [data]},
        }
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    model = ScriptedModel(GENERIC, "{}")
    run(model, tools=[tool])
    moved = json.loads(model.samplings[0].json_schema)["$defs"]["arguments0"]["properties"]
    assert moved["enum"] == {"$ref": "#/$defs/arguments0"}
    assert moved["default"] == {"anyOf": [{"$ref": "#/$defs/arguments0/properties/enum"}], "enum": [data]}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_marks_are_shown(name: str) -> None:
    def shown(**options: Any) -> set[str]:
        return {*prepare_chat(ScriptedModel(template(name)), ASK, **options).keep_special}

    with_tools = shown(tools=TOOLS)
    without = shown() if name != "hermes-3" else set()  # its template is for conversations with tools only
    marks = {
        "DeepSeek": "<｜tool▁call▁begin｜>",
        "Mistral": "[TOOL_CALLS]",
        "XmlCalls": "<tool_call>",
        "Hermes": "</tool_call>",
        "Llama3": "<|python_tag|>",
        "Generic": None,
    }
    mark = marks[FAMILIES[name]]
    assert mark is None or (mark in with_tools and mark not in without)
    assert ("</think>" in without) == (name in {"qwen-3", "qwen-3.5", "deepseek-r1", "deepseek-v3.1"})
    assert ("[/THINK]" in without) == (name == "ministral-3")


def test_without_tools_text_is_text() -> None:
    written = '<tool_call>{"name": "get_time"}</tool_call>'
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer, _ = run(ScriptedModel(template("qwen-2.5"), written), **options)
        assert answer == Answer(written)


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": ["f"]}, "tools[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [tool(name="")]}, "tools[0].function.name"),
    ({"tools": [tool(name="<|im_end|>")]}, "tools[0].function.name"),
    ({"tools": [tool(), tool()]}, "2 functions named 'f'"),
    ({"tools": [tool(description=5)]}, "tools[0].function.description"),
    ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters.type"),
    ({"tools": [tool(parameters={"properties": {"a": {"type": "strnig"}}})]}, "parameters.properties.a.type"),
    ({"tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": "required"}, "tools"),
    ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "'g'"),
    ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"json_schema": "{"}, "json_schema is not JSON"),
    ({"json_schema": '{"type": "strnig"}'}, "json_schema.type"),
]


@pytest.mark.parametrize(("options", "named"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput) as error:
        prepare_chat(ScriptedModel(GENERIC), ASK, **options)
    assert named in str(error.value)


CALL = MESSAGES[2]["tool_calls"][0]
BAD_MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({"tool_calls": "x"}, "messages[0].tool_calls"),
    ({"tool_calls": [5]}, "messages[0].tool_calls[0].function.name"),
    ({"tool_calls": [CALL, {"function": {}}]}, "messages[0].tool_calls[1].function.name"),
    ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments is not JSON"),
    ({"tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}, "arguments is list"),
]


@pytest.mark.parametrize(("message", "named"), BAD_MESSAGES)
def test_bad_messages_are_named(message: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput) as error:
        prepare_chat(ScriptedModel(GENERIC), [{"role": "assistant", **message}])
    assert named in str(error.value)


def test_thinking_that_a_model_cannot() -> None:
    with pytest.raises(Unsupported, match="does not think"):
        prepare_chat(ScriptedModel(template("qwen-2.5")), ASK, think=True)


def test_a_model_without_a_template() -> None:
    with pytest.raises(Unsupported, match="template"):
        prepare_chat(ScriptedModel(""), ASK, tools=TOOLS)
