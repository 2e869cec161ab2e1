"""The conversations that mlc_llm and web-llm write are those of the model's own template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from alight.chat import ChatTemplate
from alight_converters.export.mlc_conversation import DEFAULT_SYSTEM, Tokens, conversation

TEMPLATES = Path(__file__).parent.parent / "data" / "templates"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set rule = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set rule = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (rule if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ALPACA = "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}### assistant:\n"
SOURCES = {"chatml": CHATML, "phi-3": PHI3, "zephyr": ZEPHYR, "llama-2": LLAMA2, "alpaca": ALPACA} | {
    name: (TEMPLATES / f"{name}.jinja").read_text()
    for name in (
        "llama-3.1", "llama-3.2", "gemma-2", "mistral-nemo", "mistral-small-3.2", "ministral-3", "qwen-2.5", "qwen-3",
        "qwen-3.5", "deepseek-r1",
    )
}  # fmt: skip
ENDS = {
    "chatml": "<|im_end|>", "phi-3": "<|end|>", "llama-3.1": "<|eot_id|>", "llama-3.2": "<|eot_id|>",
    "gemma-2": "<eos>", "qwen-2.5": "<|im_end|>", "qwen-3": "<|im_end|>", "qwen-3.5": "<|im_end|>",
    "deepseek-r1": "<｜end▁of▁sentence｜>",
}  # fmt: skip
BOS = "<bos>"

TURN = [("user", "Why is the sky blue?"), ("assistant", "Because of\nRayleigh."), ("user", "And the sea?")]
RULE = [("system", "Be brief.")]


def tokens_of(name: str) -> Tokens:
    """All that looks like a control token in a template, numbered; its first and last ones."""
    found = re.findall(r"<\|[a-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[/?[A-Z_]+\]", SOURCES[name])
    end = ENDS.get(name, "</s>")
    texts = sorted({*found, "<|user|>", "<|assistant|>", "<|system|>", BOS, end})
    added = {text: 100 + number for number, text in enumerate(texts)}
    return Tokens(added, BOS, True, (added[end],))


def mlc_prompt(template: Mapping[str, Any], messages: list[tuple[str, str]], bos: int) -> str:
    """How mlc_llm's `Conversation.as_prompt` puts a prompt together."""
    rule = messages[0][1] if messages[0][0] == "system" else template["system_message"]
    text = template["system_template"].replace("{system_message}", rule)
    written = text != ""
    separators = template["seps"] * (3 - len(template["seps"]))
    for index, (role, content) in enumerate([m for m in messages if m[0] != "system"]):
        if template["add_role_after_system_message"] or not written or index > 0:
            text += template["roles"][role] + template["role_content_sep"]
        text += template["role_templates"][role].replace(f"{{{role}_message}}", content)
        text += separators[role == "assistant"]
    first = BOS if template["system_prefix_token_ids"] == [bos] else ""
    return first + text + template["roles"]["assistant"] + template["role_empty_sep"]


def model_prompt(name: str, messages: list[tuple[str, str]]) -> str:
    template = ChatTemplate(SOURCES[name], bos=BOS, eos=ENDS.get(name, "</s>"))
    pieces = template.render(
        [{"role": role, "content": content} for role, content in messages],
        variables={"date_string": "26 Jul 2024"},
    )
    return "".join(str(piece) for piece in pieces)


@pytest.mark.parametrize("name", SOURCES)
def test_the_prompts_are_the_models(name: str) -> None:
    tokens = tokens_of(name)
    found = conversation(SOURCES[name], tokens)
    conversations = [RULE + TURN[:1], RULE + TURN, TURN[:1], TURN]
    if name == "gemma-2":  # it refuses system messages
        conversations = conversations[2:]
    if name == "mistral-nemo":  # it writes the system message into the last turn, which MLC cannot
        del conversations[1]
    for messages in conversations:
        if messages[0][0] != "system" and found["system_message"] == DEFAULT_SYSTEM:
            wanted = model_prompt(name, [("system", DEFAULT_SYSTEM), *messages])
            if name == "mistral-nemo" and len(messages) > 1:
                continue
        else:
            wanted = model_prompt(name, messages)
        assert mlc_prompt(found, messages, tokens.added[BOS]) == wanted
    assert tokens.ends[0] in found["stop_token_ids"]


def test_end_of_turn_is_found_where_the_config_has_another_end() -> None:
    found = conversation(SOURCES["gemma-2"], tokens_of("gemma-2"))
    assert found["stop_str"] == ["<end_of_turn>"]
    assert tokens_of("gemma-2").added["<end_of_turn>"] in found["stop_token_ids"]


def test_the_template_says_its_own_system_message() -> None:
    found = conversation(SOURCES["qwen-2.5"], tokens_of("qwen-2.5"))
    assert found["system_message"] == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert conversation(CHATML, tokens_of("chatml"))["system_message"] == DEFAULT_SYSTEM


def test_thoughts_in_the_history() -> None:
    assert conversation(SOURCES["qwen-3"], tokens_of("qwen-3"))["strip_reasoning_in_history"]
    assert not conversation(CHATML, tokens_of("chatml"))["strip_reasoning_in_history"]


def test_no_template() -> None:
    tokens = tokens_of("chatml")
    found = conversation("", tokens)
    assert found["system_prefix_token_ids"] == [tokens.added[BOS]]
    assert mlc_prompt(found, [("user", "Once upon")], tokens.added[BOS]) == f"{BOS}Once upon"


@pytest.mark.parametrize("source", ["{{ raise_exception('never') }}", "{{ messages[-1]['content'] }}"])
def test_templates_that_mlc_cannot_follow(source: str, caplog: pytest.LogCaptureFixture) -> None:
    found = conversation(source, tokens_of("chatml"))
    assert found["roles"] == {"user": "", "assistant": ""}
    assert "get no roles" in caplog.text


def test_a_prompt_that_differs_is_told(caplog: pytest.LogCaptureFixture) -> None:
    conversation(SOURCES["qwen-2.5"], tokens_of("qwen-2.5"))
    assert not caplog.records
    conversation(SOURCES["mistral-nemo"], tokens_of("mistral-nemo"))
    assert "another prompt than the model's template for system, user, assistant, user" in caplog.text
