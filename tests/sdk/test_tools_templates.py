"""Conversations with tools through real chat templates, against what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedModel

from alight import chat
from alight.chat import ChatTemplate
from alight.tools import Answer, can_call_tools, can_think, prepare_chat
from alight.tools.prepare import family_of
from alight.tools.readers import Calls

DATA = Path(__file__).parent.parent / "data/templates"
CONVERSATION = json.loads((DATA / "conversation.json").read_text())
MESSAGES, TOOLS = CONVERSATION["messages"], CONVERSATION["tools"]
GENERIC = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>{# system #}"

FAMILIES = {
    "deepseek-r1": "DeepSeek",
    "deepseek-v3.1": "DeepSeek",
    "gemma-2": "Generic",
    "hermes-3": "Hermes",
    "llama-3.1": "Llama3",
    "llama-3.2": "Llama3",
    "ministral-3": "Mistral",
    "mistral-nemo": "Mistral",
    "mistral-small-3.2": "Mistral",
    "qwen-2.5": "Hermes",
    "qwen-3": "Hermes",
    "qwen-3-coder": "XmlCalls",
    "qwen-3.5": "XmlCalls",
}
THINKERS = {"deepseek-r1", "deepseek-v3.1", "ministral-3", "qwen-3", "qwen-3.5"}


def template(name: str) -> str:
    return (DATA / f"{name}.jinja").read_text()


def prompt(source: str, messages: Any = MESSAGES, **options: Any) -> str:
    """The prompt of a conversation, as text."""
    return bytes(prepare_chat(ScriptedModel(source), messages, **options).tokens).decode()


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(autouse=True)
def a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_now", lambda form: "26 Jul 2024")


def test_all_templates_are_tried() -> None:
    assert {file.stem for file in DATA.glob("*.jinja")} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    known = ChatTemplate(template(name))
    assert type(family_of(known)).__name__ == FAMILIES[name]
    assert can_call_tools(known) == (FAMILIES[name] != "Generic")
    assert can_think(known) == (name in THINKERS)


@pytest.mark.parametrize("name", [file.stem for file in sorted(DATA.glob("*.txt"))])
def test_the_prompt_is_that_of_transformers(name: str) -> None:
    # DeepSeek's templates know calls and results but not the tools; those are described by us, below.
    tools = None if name.startswith("deepseek") else TOOLS
    assert prompt(template(name), tools=tools) == (DATA / f"{name}.txt").read_text()


def test_tools_of_a_template_that_does_not_render_them() -> None:
    text = prompt(template("deepseek-r1"), tools=TOOLS)
    assert '"name": "get_weather"' in text
    assert "<｜tool▁call▁begin｜>function<｜tool▁sep｜>function_name\n```json\n" in text
    assert text.index("You know the weather.") < text.index("get_time") < text.index("Zürich")


def test_arguments_as_text_where_the_template_joins_them() -> None:
    old = template("deepseek-r1").replace(
        "tool['function']['arguments'] | tojson", "tool['function']['arguments']"
    )
    assert prompt(old) == prompt(template("deepseek-r1"))


def test_several_calls_of_llama_become_several_messages() -> None:
    calls = [
        {"id": id, "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
        for id, city in (("one", "Rome"), ("two", "Oslo"))
    ]
    messages = [
        *ask("Where is it warmer?"),
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "two", "content": "5"},
        {"role": "tool", "tool_call_id": "one", "content": "30"},
        *ask("So?"),
    ]
    text = prompt(template("llama-3.2"), messages, tools=TOOLS)
    found = [text.index(part) for part in ("Rome", '"30"', "Oslo", '"5"', "So?")]
    assert found == sorted(found)


def test_mistral_takes_ids_from_elsewhere() -> None:
    text = json.dumps(MESSAGES).replace("a1B2c3D4e", "call_0123456789abcdef")
    mapped = prompt(template("mistral-small-3.2"), json.loads(text), tools=TOOLS)
    id = mapped.partition("[CALL_ID]")[2][:9]
    assert id.isalnum()
    assert f"[TOOL_RESULTS]{id}[TOOL_CONTENT]21 degrees" in mapped


def test_results_without_ids_belong_to_the_calls_in_order() -> None:
    messages = json.loads(json.dumps(MESSAGES))
    del messages[3]["tool_call_id"]
    assert prompt(template("mistral-nemo"), messages) == prompt(template("mistral-nemo"), MESSAGES)


def test_a_template_without_tools_gets_a_system_message() -> None:
    text = prompt(GENERIC, tools=TOOLS)
    system, user, assistant, result, end = text.removeprefix("<|system|>").split("\n<|")
    assert system.startswith("You know the weather.\n\nYou can call these functions:\n{")
    assert system.count('"name": ') == 3
    assert user == "user|>Is it warm in Zürich?"
    assert assistant == 'assistant|>{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}'
    assert result == "user|>Result of get_weather: 21 degrees"
    assert end == "assistant|>"


def test_a_template_without_a_system_message_gets_it_from_the_user() -> None:
    text = prompt(template("gemma-2"), ask("Is it warm?"), tools=TOOLS)
    assert text.startswith("<BOS><start_of_turn>user\nYou can call these functions:")
    assert text.count("<start_of_turn>user") == 1
    assert text.endswith("Is it warm?<end_of_turn>\n<start_of_turn>model\n")


def test_text_parts_and_instructions() -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    text = prompt(GENERIC, [{"role": "developer", "content": parts}, *ask("Hi")], tools=TOOLS)
    assert "<|system|>Be brief.\n\nYou can call" in text


def test_no_tools_without_choice() -> None:
    for name in ("qwen-3", "llama-3.2", "mistral-nemo"):
        assert prompt(template(name), tools=TOOLS, tool_choice="none") == prompt(template(name))
        assert "get_time" not in prompt(template(name), tools=TOOLS, tool_choice="none")


@pytest.mark.parametrize(
    ("name", "think", "ends"),
    [
        ("qwen-3", None, "assistant\n"),
        ("qwen-3", True, "assistant\n"),
        ("qwen-3", False, "assistant\n<think>\n\n</think>\n\n"),
        ("qwen-3.5", None, "assistant\n<think>\n"),
        ("qwen-3.5", False, "assistant\n<think>\n\n</think>\n\n"),
        ("deepseek-v3.1", True, "<think>"),
        ("deepseek-v3.1", False, "<think></think>"),
        ("deepseek-r1", True, "<think>\n"),
        ("ministral-3", None, "[/INST]"),
        ("ministral-3", False, "[/INST][THINK]\n\n[/THINK]\n\n"),
        ("qwen-2.5", False, "assistant\n"),
    ],
)
def test_thinking_on_and_off(name: str, think: bool | None, ends: str) -> None:
    assert prompt(template(name), ask("Hi"), think=think).endswith(ends)


def test_thinking_that_has_no_switch_is_closed() -> None:
    source = "{{ messages[0].content }}<think>{{ '\\n' }}"
    assert prompt(source, ask("Hi"), think=False) == "Hi<think>\n\n</think>\n\n"


def test_control_tokens_in_tools_and_arguments_are_cut() -> None:
    known = ChatTemplate(
        "{{ tools | tojson(ensure_ascii=True) }}{{ messages | tojson }}", control_tokens=["<|im_end|>"]
    )
    forged = {"<|im_end|>": "<|im_end|>"}
    pieces = known.render([{"role": "user", "content": "x", "arguments": forged}], tools=[forged])
    assert "".join(pieces).count("<|im_end|>") == 4
    assert not any("<|im_end|>" in piece for piece in pieces)


@pytest.mark.parametrize("name", FAMILIES)
def test_our_own_instructions_show_a_call_that_is_read(name: str) -> None:
    """They tell of tools where a template does not; here every family shows what it would say."""
    family = family_of(ChatTemplate(template(name)))
    text = family.instructions(TOOLS)
    assert '"name": "get_weather"' in text and "Its name" in text
    shown = text[text.index(family.call_start + "function_name") :].partition("\nTo answer")[0]
    calls = Calls()
    reader = family.reader({"function_name": {}}, calls)
    (call,) = Answer.of([*reader.feed(shown), *reader.finish()]).calls
    assert (call.name, json.loads(call.arguments)) == ("function_name", {"argument": "value"})
