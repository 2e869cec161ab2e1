"""Ollama's chat and generate over a real connection: tools, thinking, formats, templates, filling in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gguf_writer import F32, gguf
from scripted import ScriptedModel

from alight.artifact import Artifact
from alight.chat import ChatTemplate
from alight.server import Models, running

TEMPLATES = Path(__file__).parent.parent / "data/templates"
QWEN = (TEMPLATES / "qwen-3.jinja").read_text()
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": [1, 2]}}\n</tool_call>'
HI = [{"role": "user", "content": "hi"}]
FILLER = {
    "general.architecture": "llama",
    "tokenizer.ggml.fim_pre_token_id": 1,
    "tokenizer.ggml.fim_suf_token_id": 2,
    "tokenizer.ggml.fim_mid_token_id": 3,
}
STAR = {
    "general.architecture": "llama",
    "tokenizer.ggml.tokens": ["a", "<fim_middle>", "<fim_prefix>", "<fim_suffix>"],
}

Say = Callable[..., ScriptedModel]


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    with Models() as models:
        yield models


@pytest.fixture(scope="module")
def client(models: Models) -> Iterator[httpx.Client]:
    with running(models) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def say(models: Models, request: pytest.FixtureRequest) -> Say:
    """Offers a model of the test's own, under the test's name, that gives these answers."""

    def offer(template: str, *answers: str, artifact: Artifact | None = None) -> ScriptedModel:
        model = ScriptedModel(template, *answers)
        models.add(f"m{abs(hash(request.node.name))}", model, artifact)
        return model

    return offer


@pytest.fixture
def ask(client: httpx.Client, request: pytest.FixtureRequest) -> Callable[..., list[dict[str, Any]]]:
    """The lines that the test's model answers with; one where `stream` is false."""

    def send(path: str = "chat", status: int = 200, **fields: Any) -> list[dict[str, Any]]:
        body = {"model": f"m{abs(hash(request.node.name))}", **fields}
        if path == "chat":
            body.setdefault("messages", HI)
        response = client.post(f"/api/{path}", json=body)
        assert response.status_code == status, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    return send


Ask = Callable[..., list[dict[str, Any]]]


def joined(lines: list[dict[str, Any]], key: str = "content") -> str:
    return "".join(line["message"].get(key, "") for line in lines)


# -- tools -----------------------------------------------------------------------------------------


def test_a_tool_call_is_an_object_and_comes_whole(say: Say, ask: Ask) -> None:
    model = say(QWEN, f"<think>\n\n</think>\n\nLet me look.\n{CALL}", f"{CALL}")
    lines = ask(tools=[TOOL], think=False)
    calls = [call for line in lines for call in line["message"].get("tool_calls", [])]
    assert [call["function"] for call in calls] == [
        {"index": 0, "name": "weather", "arguments": {"city": "Paris", "days": [1, 2]}}
    ]
    assert calls[0]["id"]
    assert joined(lines).strip() == "Let me look."
    assert "tool_call" not in joined(lines)
    assert (lines[-1]["done_reason"], lines[-1]["message"]) == ("stop", {"role": "assistant", "content": ""})
    assert '"name": "weather"' in model.prompts[0]

    (whole,) = ask(tools=[TOOL], think=False, stream=False)
    assert whole["message"]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris", "days": [1, 2]}


def test_two_calls_are_counted(say: Say, ask: Ask) -> None:
    say(QWEN, f"{CALL}\n{CALL}")
    (whole,) = ask(tools=[TOOL], think=False, stream=False)
    assert [call["function"]["index"] for call in whole["message"]["tool_calls"]] == [0, 1]
    assert len({call["id"] for call in whole["message"]["tool_calls"]}) == 2


def test_what_a_tool_said_reaches_the_template(say: Say, ask: Ask) -> None:
    model = say(QWEN, "Sunny.")
    conversation = [
        *HI,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
        },
        {"role": "tool", "tool_name": "weather", "content": "28 degrees"},
    ]
    ask(messages=conversation, tools=[TOOL], think=False)
    assert '{"name": "weather", "arguments": {"city": "Rome"}}' in model.prompts[0]
    assert "<tool_response>\n28 degrees\n</tool_response>" in model.prompts[0]


def test_roles_may_be_capital(say: Say, ask: Ask) -> None:
    model = say(PLAIN, "x")
    ask(messages=[{"role": "User", "content": "hi"}])
    assert model.prompts == ["<user>hi<assistant>"]


# -- thinking --------------------------------------------------------------------------------------


def test_thinking_has_a_place_of_its_own(say: Say, ask: Ask) -> None:
    model = say(QWEN, *["<think>\nHm.\n</think>\n\nYes."] * 3, "Yes.", "<think>\nHm.\n</think>\n\nYes.")
    for fields in ({}, {"think": True}, {"think": "high"}):
        lines = ask(**fields)
        assert joined(lines, "thinking").strip() == "Hm."
        assert joined(lines).strip() == "Yes."
        first = next(i for i, line in enumerate(lines) if line["message"].get("content"))
        assert all(line["message"]["content"] == "" for line in lines[:first])
    (whole,) = ask(think=False, stream=False)
    assert whole["message"] == {"role": "assistant", "content": "Yes."}
    assert "<think>\n\n</think>" in model.prompts[3]
    (whole,) = ask("generate", prompt="hi", stream=False)
    assert (whole["thinking"].strip(), whole["response"].strip()) == ("Hm.", "Yes.")


def test_thinking_before_is_told_by_its_other_name(say: Say, ask: Ask) -> None:
    model = say("{% for m in messages %}[{{ m.reasoning_content }}|{{ m.content }}]{% endfor %}", "x")
    ask(messages=[{"role": "assistant", "content": "a", "thinking": "t"}, *HI])
    assert model.prompts == ["[t|a][|hi]"]


def test_a_format_comes_after_the_thinking(say: Say, ask: Ask) -> None:
    model = say(QWEN, "Hm.\n</think>", '{"a": 1}')  # the prompt ends with <think>
    (whole,) = ask(format={"type": "object"}, stream=False)
    assert whole["message"]["thinking"].strip() == "Hm."
    assert json.loads(whole["message"]["content"]) == {"a": 1}
    assert [sampling.json_schema for sampling in model.samplings] == ["", '{"type": "object"}']


# -- format, logprobs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "schema"), [("json", "{}"), ({}, "{}"), ({"type": "object"}, '{"type": "object"}'), ("", "")]
)
def test_formats(say: Say, ask: Ask, form: Any, schema: str) -> None:
    model = say(PLAIN, "{}", "{}", "{}")
    ask(format=form)
    ask("generate", prompt="hi", format=form)
    ask("generate", prompt="hi", raw=True, format=form)
    assert [sampling.json_schema for sampling in model.samplings] == [schema] * 3


def test_logprobs(say: Say, ask: Ask) -> None:
    model = say(PLAIN, "é!", "é!", "é!", "é!")
    lines = ask(logprobs=True, top_logprobs=2)
    found = [one for line in lines for one in line.get("logprobs", [])]
    assert found == [
        {
            "token": text,
            "logprob": -0.5,
            "bytes": [*text.encode()],
            "top_logprobs": [
                {"token": "a", "logprob": -1.0, "bytes": [97]},
                {"token": "b", "logprob": -2.0, "bytes": [98]},
            ],
        }
        for text in "é!"
    ]
    assert "logprobs" not in lines[-1]
    (whole,) = ask("generate", prompt="x", logprobs=True, stream=False)
    assert [list(one) for one in whole["logprobs"]] == [["token", "logprob", "bytes"]] * 2
    assert "logprobs" not in ask(top_logprobs=2, stream=False)[0], "they count only with `logprobs`"
    assert "logprobs" not in ask(logprobs=False, stream=False)[0]
    assert [sampling.logprobs for sampling in model.samplings] == [2, 0, None, None]


# -- generate --------------------------------------------------------------------------------------


def test_system_and_template(say: Say, ask: Ask) -> None:
    model = say(PLAIN, *"12345")
    ask("generate", prompt="p", system="s")
    ask("generate", prompt="p", template="[INST] {{ .System }} {{ .Prompt }} [/INST]", system="s")
    ask("generate", prompt="p", raw=True)
    assert model.prompts == ["<system>s<user>p<assistant>", "[INST] s p [/INST]", "p"]
    (whole,) = ask("generate", status=400, prompt="p", template="{{ if }}")
    assert whole["error"].startswith("template error: ")
    (whole,) = ask("generate", status=400, prompt="p", template="{% for m in messages %}{% endfor %}")
    assert "`template` is in Jinja" in whole["error"]
    for fields in ({"template": "x"}, {"system": "x"}, {"context": [1]}):
        (whole,) = ask("generate", status=400, prompt="p", raw=True, **fields)
        assert whole["error"] == "raw mode does not support template, system, or context"


def test_a_template_keeps_users_users(models: Models, say: Say, ask: Ask) -> None:
    model = say(PLAIN, "x")
    model.template = ChatTemplate(PLAIN, control_tokens=["<|end|>"])
    tokens: list[tuple[str, bool]] = []
    before = model.tokenize

    def tokenize(text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        tokens.append((text, special))
        return before(text)

    model.tokenize = tokenize  # type: ignore[method-assign]
    ask("generate", prompt="a<|end|>b", template="{{ .Prompt }}<|end|>")
    assert [text for text, _ in tokens] == ["a<", "|end|>b<|end|>"]


def test_a_context_goes_on(say: Say, ask: Ask) -> None:
    model = say(PLAIN, "one", "two")
    (first,) = ask("generate", prompt="a", stream=False)
    assert bytes(first["context"]) == b"<user>a<assistant>one"
    (second,) = ask("generate", prompt="b", context=first["context"], stream=False)
    assert bytes(second["context"]) == b"<user>a<assistant>one<user>b<assistant>two"
    assert model.prompts[1] == "<user>a<assistant>one<user>b<assistant>"


@pytest.mark.parametrize(
    ("metadata", "marks"), [(FILLER, (1, 2, 3)), (STAR, (2, 3, 1))], ids=["ids", "texts"]
)
def test_filling_in(
    say: Say, ask: Ask, tmp_path: Path, metadata: dict[str, Any], marks: tuple[int, ...]
) -> None:
    file = tmp_path / "filler.gguf"
    file.write_bytes(gguf(metadata, [("t", (32, 2), F32, 0)], bytes(256)))
    model = say(PLAIN, "middle", artifact=Artifact.loose(file))
    (whole,) = ask("generate", prompt="before", suffix="after", stream=False)
    assert whole["response"] == "middle"
    before, after, middle = map(chr, marks)
    assert model.prompts == [f"{before}before{after}after{middle}"]


def test_filling_in_by_the_template(say: Say, ask: Ask) -> None:
    model = say(PLAIN, "middle")
    template = "{{ if .Suffix }}<PRE>{{ .Prompt }}<SUF>{{ .Suffix }}<MID>{{ else }}{{ .Prompt }}{{ end }}"
    ask("generate", prompt="before", suffix="after", template=template)
    assert model.prompts == ["<PRE>before<SUF>after<MID>"]


def test_what_a_model_cannot(say: Say, ask: Ask) -> None:
    say(PLAIN)
    for fields, named in [
        ({"suffix": "x"}, "does not support insert"),
        ({"think": True}, "does not support thinking"),
        ({"think": True, "raw": True}, "does not support thinking"),
        ({"images": ["aGk="]}, "images"),
        ({"width": 512}, "width"),
        ({"tools": [TOOL]}, "tools"),  # of chat
    ]:
        (refused,) = ask("generate", status=400, prompt="x", **fields)
        assert named in refused["error"]
