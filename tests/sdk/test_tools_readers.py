"""What models of each family write, taken apart: the same result wherever the text is cut."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedModel
from test_tools_templates import GENERIC, TOOLS, template

from alight.tools import Answer, Delta, prepare_chat

ROME = ("get_weather", {"city": "Rome"})
OSLO = ("get_weather", {"city": "Oslo", "days": 3})
TIME = ("get_time", {})
BRACES = ("get_weather", {"city": 'a "}" </tool_call> [TOOL_CALLS] \\ {é'})
A, Z = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
B, S, E = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def hermes(name: str, arguments: dict[str, Any]) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def r1(name: str, arguments: dict[str, Any]) -> str:
    return f"{B}function{S}{name}\n```json\n{json.dumps(arguments)}\n```{E}"


def xml(name: str, **values: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


def plain(name: str, arguments: dict[str, Any], **more: str) -> str:
    return json.dumps({"name": name, "arguments": arguments, **more})


# template, what the model writes, the text, the reasoning, the calls
CASES: list[tuple[str, str, str, str, list[tuple[str, dict[str, Any]]]]] = [
    ("qwen-2.5", "It is warm.\n\nVery < warm <tool", "It is warm.\n\nVery < warm <tool", "", []),
    ("qwen-2.5", " two  spaces \n", " two  spaces \n", "", []),
    ("qwen-2.5", "", "", "", []),
    ("qwen-2.5", hermes(*ROME), "", "", [ROME]),
    ("qwen-2.5", f"{hermes(*ROME)}\n{hermes(*OSLO)}\n{hermes(*TIME)}", "", "", [ROME, OSLO, TIME]),
    ("qwen-2.5", f"I look it up.\n{hermes(*ROME)}\n", "I look it up.", "", [ROME]),
    ("qwen-2.5", f"{hermes(*ROME)}\nNow I wait.", "\nNow I wait.", "", [ROME]),
    ("qwen-2.5", hermes(*BRACES), "", "", [BRACES]),
    ("qwen-2.5", hermes(*ROME).removesuffix("</tool_call>"), "", "", [ROME]),
    ("qwen-2.5", hermes(*ROME)[:-30], hermes(*ROME)[len("<tool_call>") : -30], "", []),
    ("qwen-2.5", "a <tool_call>{oops}</tool_call> b", "a {oops} b", "", []),
    ("qwen-2.5", '<tool_call>{"name": 5}</tool_call>', '{"name": 5}', "", []),
    (
        "qwen-2.5",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '{"name": "f", "arguments": [1]}',
        "",
        [],
    ),
    (
        "qwen-2.5",
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '{"name": "f", "arguments": {"x": NaN}}',
        "",
        [],
    ),
    ("qwen-2.5", '<tool_call>{"name": "get_time", "arguments": "{}"}</tool_call>', "", "", [TIME]),
    ("qwen-2.5", '<tool_call>{"name": "get_time"}</tool_call>', "", "", [TIME]),
    (
        "qwen-2.5",
        '<tool_call>\n[{"name": "get_time"}, {"name": "get_time"}]\n</tool_call>',
        "",
        "",
        [TIME, TIME],
    ),
    ("qwen-2.5", '{"name": "get_weather", "arguments": {"city": "Rome"}}', "", "", [ROME]),
    ("qwen-2.5", '{"name": "Ann", "arguments": {}}', '{"name": "Ann", "arguments": {}}', "", []),
    ("qwen-2.5", '{"a": 1} and ' + hermes(*ROME), '{"a": 1} and', "", [ROME]),
    ("qwen-2.5", f"{hermes('f', {'deep': [[['x']]]})}", "", "", [("f", {"deep": [[["x"]]]})]),
    ("qwen-3", "<think>\nHm, Rome?\n</think>\n\n" + hermes(*ROME), "", "Hm, Rome?", [ROME]),
    ("qwen-3", "<think>\n\n</think>\n\nHello.", "Hello.", "", []),
    ("qwen-3", "<think>a <b </think >\n c</think>x", "x", "a <b </think >\n c", []),
    ("qwen-3", "Hello <think> there", "Hello <think> there", "", []),
    ("qwen-3", "\n <thin", "\n <thin", "", []),
    ("qwen-3", "<think>never ends", "", "never ends", []),
    ("qwen-3", "<think>" + hermes(*ROME) + "</think>" + hermes(*OSLO), "", hermes(*ROME), [OSLO]),
    ("qwen-3.5", "I think.\n</think>\n\nHi\n\n" + hermes(*ROME), "Hi", "I think.", [ROME]),
    ("qwen-3.5", "no end of it \n", "", "no end of it", []),
    (
        "qwen-3-coder",
        xml("get_weather", city="Rome"),
        "",
        "",
        [ROME],
    ),
    (
        "qwen-3-coder",
        "Well.\n" + xml("get_weather", city="Oslo", days="3") + "\n" + xml("get_time"),
        "Well.",
        "",
        [OSLO, TIME],
    ),
    (
        "qwen-3-coder",
        xml("f", a='one\n\ntwo " {', b="[1, true]"),
        "",
        "",
        [("f", {"a": 'one\n\ntwo " {', "b": [1, True]})],
    ),
    (
        "qwen-3-coder",
        "<tool_call>\n<function=f>\noops\n</function>\n</tool_call>",
        "\n<function=f>\noops\n</function>\n",
        "",
        [],
    ),
    ("llama-3.2", '{"name": "get_weather", "parameters": {"city": "Rome"}}', "", "", [ROME]),
    ("llama-3.2", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}', "", "", [ROME]),
    ("llama-3.2", 'Sure:<|python_tag|>{"name": "get_time", "parameters": {}}', "Sure:", "", [TIME]),
    (
        "llama-3.2",
        '{"name": "get_time", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "Rome"}}',
        "",
        "",
        [TIME, ROME],
    ),
    ("llama-3.2", '{"name": "get_time", "parameters": {}}\nDone.', "Done.", "", [TIME]),
    ("llama-3.2", '{"answer": 42}', '{"answer": 42}', "", []),
    ("llama-3.2", '<|python_tag|>print("hi")', 'print("hi")', "", []),
    (
        "llama-3.2",
        '{"name": "get_weather", "parameters": {"ci',
        '{"name": "get_weather", "parameters": {"ci',
        "",
        [],
    ),
    ("llama-3.2", "It is {warm} today.", "It is {warm} today.", "", []),
    (
        "mistral-nemo",
        f"[TOOL_CALLS][{plain(*ROME, id='a1b2c3d4e')}, {plain(*TIME)}]",
        "",
        "",
        [ROME, TIME],
    ),
    ("mistral-nemo", '[TOOL_CALLS] {"name": "get_time", "arguments": {}} yes', " yes", "", [TIME]),
    ("mistral-nemo", "[TOOL_CALLS][{bad}] [TOOL", "[{bad}] [TOOL", "", []),
    ("mistral-small-3.2", '[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Rome"}', "", "", [ROME]),
    (
        "ministral-3",
        '[THINK]So.[/THINK]Hm.[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}[TOOL_CALLS]get_time[ARGS]{}',
        "Hm.",
        "So.",
        [ROME, TIME],
    ),
    ("ministral-3", f"[TOOL_CALLS]get_weather[ARGS]{json.dumps(BRACES[1])}", "", "", [BRACES]),
    ("ministral-3", "[TOOL_CALLS]get_weather[ARGS]none", "get_weather[ARGS]none", "", []),
    ("deepseek-r1", f"Let me see.{A}{r1(*ROME)}\n{r1(*TIME)}{Z}", "Let me see.", "", [ROME, TIME]),
    ("deepseek-r1", f"{A}{B}function{S}get_time\n```json\n{{}}\n```", "", "", [TIME]),
    ("deepseek-r1", f"{A}{B}nonsense{E}{Z}", "nonsense", "", []),
    ("deepseek-v3.1", f'{A}{B}get_weather{S}{{"city": "Rome"}}{E}{Z}', "", "", [ROME]),
    ("generic", '{"name": "get_weather", "arguments": {"city": "Rome"}}', "", "", [ROME]),
    ("generic", '{"response": "It\\u0027s \\"warm\\"\\n\\ud83d\\ude00 é"}', 'It\'s "warm"\n😀 é', "", []),
    ("generic", ' { "response" : "cut of\\u00', "cut of\\u00", "", []),
    ("generic", '{"response": 5}', '{"response": 5}', "", []),
    ("generic", '{"name": "get_wea', '{"name": "get_wea', "", []),
    ("generic", "No JSON at all", "No JSON at all", "", []),
]


@functools.cache  # it takes a while to compile a template
def model(name: str) -> ScriptedModel:
    return ScriptedModel(GENERIC if name == "generic" else template(name))


def parser(name: str, **options: Any) -> Any:
    messages = [{"role": "user", "content": "Is it warm in Rome?"}]
    return prepare_chat(model(name), messages, tools=TOOLS, **options).parser


def deltas(name: str, pieces: list[str], **options: Any) -> list[Delta]:
    reader = parser(name, **options)
    return [delta for piece in pieces for delta in reader.feed(piece)] + reader.finish()


def told(answer: Answer) -> tuple[str, str, list[tuple[str, Any]]]:
    return answer.text, answer.reasoning, [(call.name, json.loads(call.arguments)) for call in answer.calls]


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(("name", "written", "text", "reasoning", "calls"), CASES)
def test_recorded_answers(name: str, written: str, text: str, reasoning: str, calls: Any) -> None:
    expected = (text, reasoning, calls)
    assert told(Answer.of(deltas(name, [written]))) == expected
    assert told(Answer.of(deltas(name, list(written)))) == expected
    for place in range(1, len(written)):
        assert told(Answer.of(deltas(name, cut(written, [place])))) == expected, f"cut at {place}"


@settings(deadline=None, max_examples=200)
@given(case=st.sampled_from(CASES), places=st.lists(st.integers(0, 200), max_size=12))
def test_any_cuts(case: Any, places: list[int]) -> None:
    name, written, *expected = case
    assert list(told(Answer.of(deltas(name, cut(written, places))))) == expected


MARKUP = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    A,
    Z,
    B,
    S,
    E,
]
PIECES = [
    *MARKUP,
    '{"name": "get_time", "arguments": {}}',
    "get_time",
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    "\n",
    " ",
    "x",
    "<",
    "```json\n",
]
NAMES = [
    "qwen-2.5",
    "qwen-3",
    "qwen-3.5",
    "qwen-3-coder",
    "llama-3.2",
    "mistral-nemo",
    "ministral-3",
    "deepseek-r1",
    "generic",
]


@settings(deadline=None, max_examples=500)
@given(
    name=st.sampled_from(NAMES),
    pieces=st.lists(st.sampled_from(PIECES), max_size=12),
    cuts=st.lists(st.integers(0, 99), max_size=6),
)
def test_nonsense_is_read_the_same_however_it_is_cut(name: str, pieces: list[str], cuts: list[int]) -> None:
    written = "".join(pieces)
    whole = told(Answer.of(deltas(name, [written])))
    assert told(Answer.of(deltas(name, cut(written, cuts)))) == whole
    assert told(Answer.of(deltas(name, list(written)))) == whole
    if not whole[2]:  # nothing is lost but marks and the white space around reasoning
        left = written
        for mark in MARKUP:
            left = left.replace(mark, "")
        shown = whole[0] + whole[1]
        for mark in MARKUP:
            shown = shown.replace(mark, "")
        if name != "generic":
            assert sorted("".join(shown.split())) == sorted("".join(left.split()))


def test_deltas_of_a_stream() -> None:
    made = deltas("qwen-2.5", list("Hi there.\n" + hermes(*ROME) + hermes(*TIME)))
    assert [d.text for d in made if d.text] == ["H", "i", " t", "h", "e", "r", "e", "."]
    calls = [d.call for d in made if d.call]
    assert [call.index for call in calls] == [0, 0, 1, 1]
    assert [call.name for call in calls] == ["get_weather", "", "get_time", ""]
    assert all(bool(call.id) == bool(call.name) for call in calls)
    assert len({call.id for call in calls}) == 3
    assert all(bool(d.text) + bool(d.reasoning) + (d.call is not None) == 1 for d in made)


def test_only_one_call_where_they_must_not_be_parallel() -> None:
    made = deltas("qwen-2.5", [hermes(*ROME) + hermes(*TIME)], parallel=False)
    assert told(Answer.of(made)) == ("", "", [ROME])


def test_ids() -> None:
    written = '[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Rome"}[TOOL_CALLS]get_time[ARGS]{}'
    given, made = Answer.of(deltas("mistral-small-3.2", [written])).calls
    assert given.id == "a1b2c3d4e"
    assert len(made.id) == 9 and made.id.isalnum()
    assert Answer.of(deltas("qwen-2.5", [hermes(*ROME)])).calls[0].id.startswith("call_")


def test_a_response_with_a_schema_is_passed_on_as_json() -> None:
    schema = json.dumps({"type": "object", "properties": {"warm": {"type": "boolean"}}})
    written = '{"response": {"warm": true, "why": "\\"}"}}'
    for pieces in ([written], list(written)):
        made = Answer.of(deltas("qwen-2.5", pieces, json_schema=schema))
        assert json.loads(made.text) == {"warm": True, "why": '"}'}
    for value in ("5", '"x}"', "[1, [2]]", "null"):
        assert (
            Answer.of(deltas("qwen-2.5", list(f'{{"response": {value} }}'), json_schema="{}")).text == value
        )


def test_half_a_surrogate_pair_stays_json() -> None:
    (call,) = Answer.of(
        deltas("qwen-2.5", [r'<tool_call>{"name": "f", "arguments": {"x": "\ud800"}}</tool_call>'])
    ).calls
    assert call.arguments.encode() == rb'{"x": "\ud800"}'


def test_deep_nesting_is_text() -> None:
    deep = '<tool_call>{"name": "f", "arguments": ' + "[" * 100_000 + "</tool_call>"
    assert Answer.of(deltas("qwen-2.5", [deep])).text == deep[len("<tool_call>") : -len("</tool_call>")]
