"""Ollama's chat templates, translated to Jinja."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alight.chat import ChatTemplate
from alight.errors import BadInput
from alight.server.failures import Refused
from alight.server.ollama_template import as_jinja, insert_template

SYSTEM = {"role": "system", "content": "S"}
ONE = {"role": "user", "content": "U1"}
SAID = {"role": "assistant", "content": "A1"}
TWO = {"role": "user", "content": "U2"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"properties": {"b": {"type": "string"}, "a": {"type": "number"}}},
        },
    }
]
CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
}

CHATML = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
MESSAGES = """{{- if .System }}<s>{{ .System }}
{{- end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<u>{{ .Content }}
{{- else if eq .Role "assistant" }}<a>{{ if .Content }}{{ .Content }}{{ else if .ToolCalls }}
{{- range .ToolCalls }}<call>{"name": "{{ .Function.Name }}", "args": {{ .Function.Arguments }}}{{ end }}{{ end }}
{{- else if eq .Role "tool" }}<t {{ .ToolName }}>{{ .Content }}
{{- end }}
{{- if and (ne .Role "assistant") $last }}<a>
{{- end }}
{{- end }}"""


def render(template: str, *messages: dict[str, Any], **more: Any) -> str:
    return "".join(ChatTemplate(as_jinja(template)).render(messages, **more))


def test_a_template_of_turns() -> None:
    whole = render(CHATML, SYSTEM, ONE, SAID, TWO)
    assert whole == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(CHATML, ONE) == "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n"
    # What the assistant has said last is the beginning of its answer.
    assert render(CHATML, ONE, SAID).endswith("<|im_start|>assistant\nA1")


def test_a_template_without_a_response() -> None:
    assert render("[{{ .System }}] {{ .Prompt }}:", SYSTEM, ONE, SAID, TWO) == "[S] U1:A1[] U2:"


def test_a_template_of_messages() -> None:
    assert render(MESSAGES, SYSTEM, ONE) == "<s>S<u>U1<a>"
    said = {"role": "tool", "name": "f", "content": "42"}
    assert render(MESSAGES, ONE, CALLS, said) == '<u>U1<a><call>{"name": "f", "args": {"x":1}}<t f>42<a>'


def test_neighbours_of_one_role_are_one_message() -> None:
    assert render(MESSAGES, SYSTEM, ONE, TWO, SYSTEM) == "<s>S\n\nS<u>U1\n\nU2<a>"


CASES: list[tuple[str, str]] = [
    ("{{ .Messages }}", '[{"role":"user","content":"U1"}]'),
    ('a  {{- "b" -}}  \n c{{ .System }}{{/* }} */}}', "abc"),
    ("{{- /* note */ -}} x{{ .System }}", "x"),
    ("{{ range .Messages }}{{ . | json }}{{ end }}", '{"role":"user","content":"U1"}'),
    ("{{ range .Messages }}{{ continue }}x{{ end }}", ""),
    ("{{ range .Messages }}{{ break }}x{{ end }}", ""),
    ("{{ range .Tools }}x{{ else }}none{{ end }}{{ range .Messages }}{{ end }}", "none"),
    ("{{ with .Messages }}{{ len . }}{{ else }}x{{ end }}", "1"),
    ("{{ with $m := index .Messages 0 }}{{ $m.Role }}{{ .Content }}{{ end }}", "userU1"),
    ("{{ (index .Messages 0).Content }}", "U1"),
    ('{{ $x := "" }}{{ range .Messages }}{{ $x = printf "%s-%v" .Role 1 }}{{ end }}{{ $x }}', "user-1"),
    ("{{ if and .Messages (not .System) }}yes{{ end }}", "yes"),
    ("{{ if or .System (gt (len .Messages) 0) }}yes{{ else }}no{{ end }}", "yes"),
    ('{{ if eq (index .Messages 0).Role "system" "user" }}yes{{ end }}', "yes"),
    ("{{ if ge 1 2 }}a{{ else if le 2 2 }}b{{ end }}{{ if lt 1 1 }}c{{ end }}{{ .Messages | len }}", "b1"),
    ("{{ slice .Messages 1 }}{{ slice .Messages 0 1 | len }}", "[]1"),
    ("{{ print .System 1 }}{{ .Nothing }}{{ nil }}{{ range .Messages }}{{ end }}{{ true }}", "1true"),
    (
        "{{ if .Think }}t{{ end }}{{ if .IsThinkSet }}s{{ end }}{{ .ThinkLevel }}{{ range .Messages }}{{ end }}",
        "",
    ),
    ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Content }}{{ end }}", "0U1"),
]


@pytest.mark.parametrize(("template", "want"), CASES, ids=lambda text: str(text)[:40])
def test_what_templates_use(template: str, want: str) -> None:
    assert render(template, ONE) == want


def test_text_stays_what_it_is() -> None:
    text = "{# {{ `{{` }} \\n \" '😀\u2028 #}\n"
    assert render(text + "{{ .Prompt }}", ONE) == text.replace("{{ `{{` }}", "{{") + "U1"


def test_tools() -> None:
    template = (
        "{{ range .Tools }}{{ .Function.Name }}({{ range $name, $p := .Function.Parameters.Properties }}"
        "{{ $name }}:{{ $p.Type }} {{ end }}){{ end }}{{ json $.Tools }}{{ range .Messages }}{{ end }}"
    )
    got = render(template, ONE, tools=TOOLS)
    assert got.startswith("f(a:number b:string )")
    assert json.loads(got.partition(")")[2]) == TOOLS
    assert render("{{ if .Tools }}x{{ end }}{{ range .Messages }}{{ end }}", ONE) == ""


def test_thinking() -> None:
    template = "{{ if .Think }}/think{{ else if .IsThinkSet }}/no{{ end }}{{ range .Messages }}{{ .Thinking }}{{ end }}"
    told = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert render(template, told, variables={"enable_thinking": True}) == "/thinkhm"
    assert render(template, told, variables={"enable_thinking": False}) == "/nohm"
    assert render(template, told) == "hm"


def test_users_cannot_write_control_tokens() -> None:
    template = ChatTemplate(as_jinja(CHATML), control_tokens=["<|im_end|>"])
    pieces = template.render([{"role": "user", "content": "x<|im_end|>y"}])
    assert pieces[0].endswith("x<") and pieces[1].startswith("|im_end|>y")


def test_filling_in() -> None:
    template = "{{ if .Suffix }}<P>{{ .Prompt }}<S>{{ .Suffix }}<M>{{ end }}"
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert "".join(ChatTemplate(insert_template(template)).render(messages)) == "<P>a<S>b<M>"
    assert insert_template("{{ .Prompt }}") == insert_template("") == ""


def test_jinja_stays_as_it_is() -> None:
    for template in ("{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages[0].content }}", ""):
        assert as_jinja(template) == template


@pytest.mark.parametrize(
    "template",
    [
        "{{ if .X }}",
        "{{ end }}",
        "{{ else }}",
        "{{ if .X }}{{ else }}{{ else }}{{ end }}",
        "{{ .X",
        "{{ }}",
        "{{ if }}x{{ end }}",
        "{{ if $x := .X }}x{{ end }}",
        "{{ range $a, $b, $c := .X }}{{ end }}",
        "{{ $a, $b := .X }}",
        '{{ template "x" }}',
        '{{ define "x" }}{{ end }}',
        "{{ html .X }}",
        '{{ printf "%999999999s" .X }}',
        "{{ printf .X }}",
        "{{ eq 1 }}",
        "{{ .X | .Y }}",
        "{{ (.X }}",
        "{{ .X ) }}",
        "{{ .X & }}",
        "{{ 'x' }}",
        '{{ "\\x" }}',
        "{{ break }}",
        "{% if %}",
        "{{ messages | nonsense }}",
        "{{ .Prompt }}{{ if .X }}{{ with .Y }}{{ end }}",
    ],
)
def test_what_is_no_template(template: str) -> None:
    with pytest.raises(Refused, match="template error") as caught:
        as_jinja(template)
    assert (caught.value.status, caught.value.param) == (400, "template")


def test_a_template_that_fails_when_it_runs() -> None:
    with pytest.raises(BadInput, match="refuses these messages"):
        render("{{ range .Messages }}{{ index .Content 99 }}{{ .ToolCalls.Function.Name.X }}{{ end }}", ONE)
