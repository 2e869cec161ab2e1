"""Ollama's chat templates (Go's text/template) as Jinja, which everything else here speaks.

    {{ if .System }}<|system|>{{ .System }}{{ end }}<|user|>{{ .Prompt }}<|assistant|>{{ .Response }}

Translated and not interpreted, so that `ChatTemplate` keeps what users write from becoming control tokens.
What Ollama's own templates use is here; `define`, `template` and `block` are not. A template without
`.Messages` is rendered once for each turn, and the last time only as far as its `.Response`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache

from alight.server.failures import Refused
from alight.server.ollama_template_parser import (
    Block,
    Call,
    Expression,
    Field,
    Literal,
    Node,
    Variable,
    parse,
)

# Go's names of what a message, a tool or a call has -> ours. The others are the same in lower case.
_FIELDS = {
    "Thinking": "reasoning_content",
    "ToolCalls": "tool_calls",
    "ToolName": "name",
    "ToolCallID": "tool_call_id",
}
_ROOT = {
    "System": "top.system",
    "Messages": "top.messages",
    "Tools": "tools",
    "Prompt": "''",
    "Response": "''",
    "Suffix": "''",
    "Think": "(enable_thinking | default(false))",
    "ThinkLevel": "''",
    "IsThinkSet": "(enable_thinking is defined)",
}
_TURN = {**_ROOT, "System": "system", "Prompt": "prompt", "Response": "response"}
_INSERT = {**_ROOT, "Prompt": "messages[0].content", "Suffix": "messages[1].content"}

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

# Prints what is no text as JSON.
_SAY = """
{%- macro say(value) -%}
{%- if value is string -%}{{ value }}
{%- elif value is undefined or value is none -%}
{%- else -%}{{ value | tojson(separators=(',', ':')) }}{%- endif -%}
{%- endmacro -%}
{%- set var = namespace() -%}
"""
# Collated as Ollama does: all system texts together, and neighbours of one role as one message.
_COLLATE = """
{%- set top = namespace(system='', messages=[]) -%}
{%- for m in messages -%}
{%- set text = m.content or '' -%}
{%- if m.role == 'system' -%}
{%- set top.system = top.system ~ ('\\n\\n' if top.system else '') ~ text -%}
{%- endif -%}
{%- set last = top.messages[-1] if top.messages else {} -%}
{%- if last.role == m.role and m.role != 'tool' -%}
{%- set top.messages = top.messages[:-1] + [dict(last, content=last.content ~ '\\n\\n' ~ text)] -%}
{%- else -%}
{%- set top.messages = top.messages + [dict(m, content=text)] -%}
{%- endif -%}
{%- endfor -%}
"""
_TURNS = """
{%- set now = namespace(system='', prompt='', response='') -%}
{%- for m in top.messages -%}
{%- if (m.role == 'system' and (now.prompt or now.response)) or (m.role == 'user' and now.response) -%}
{{- turn(now.system, now.prompt, now.response) -}}
{%- set now.system = '' -%}{%- set now.prompt = '' -%}{%- set now.response = '' -%}
{%- endif -%}
{%- if m.role == 'system' -%}{%- set now.system = m.content -%}
{%- elif m.role == 'user' -%}{%- set now.prompt = m.content -%}
{%- elif m.role == 'assistant' -%}{%- set now.response = m.content -%}
{%- endif -%}
{%- endfor -%}
{{- last_turn(now.system, now.prompt, now.response) -}}
"""


def is_jinja(template: str) -> bool:
    """Whether a template is Jinja already; its messages have a small letter, Go's a capital one."""
    return "{%" in template or bool(re.search(r"(?<!\.)\bmessages\b", template))


@lru_cache(maxsize=64)
def as_jinja(template: str) -> str:
    """A template of a client's, in Go's language or in Jinja, as Jinja.

    Raises:
        Refused: 400, it does not parse; says where.
    """
    if not template or is_jinja(template):
        source = template
    else:
        nodes = parse(template)
        if _names(nodes, "Messages"):
            source = _SAY + _COLLATE + _Writer(_ROOT).write(nodes)
        else:
            if not _names(nodes, "Response"):
                nodes = [*nodes, Field(("Response",))]
            turns = _macro("turn", nodes, cut=False) + _macro("last_turn", nodes, cut=True) + _TURNS
            source = _SAY + _COLLATE + turns
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).compile(source)
    except (TemplateSyntaxError, SyntaxError) as error:  # the second one for a {% break %} outside of a loop
        raise Refused(400, f"template error: {error}", param="template") from None
    return source


def insert_template(template: str) -> str:
    """The same for filling in: its messages are the text before the gap and the one after it.

    Returns an empty text where the template has no `.Suffix`.
    """
    if not template or is_jinja(template):
        return ""
    nodes = parse(template)
    return _SAY + _Writer(_INSERT).write(nodes) if _names(nodes, "Suffix") else ""


def _macro(name: str, nodes: list[Node], *, cut: bool) -> str:
    body = _Writer(_TURN, cut=cut).write(nodes)
    return f"{{%- macro {name}(system, prompt, response) -%}}{body}{{%- endmacro -%}}"


def _names(nodes: list[Node], name: str) -> bool:
    """Whether a field of that name is used anywhere."""
    return f"path=('{name}'" in repr(nodes)


@dataclass(slots=True)
class _Scope:
    """What the dot stands for: the root where it is empty, else a Jinja variable."""

    dot: str = ""
    depth: int = 0


class _Writer:
    """Writes nodes as Jinja, with no text between its tags: white space has been trimmed by Go's rules.

    Args:
        root: what the fields of the outermost dot are in Jinja.
        cut: stop at `.Response`.
    """

    def __init__(self, root: dict[str, str], *, cut: bool = False) -> None:
        self._root = root
        self._cut = cut
        self._ended = False

    def write(self, nodes: list[Node], scope: _Scope | None = None) -> str:
        scope = scope or _Scope()
        parts: list[str] = []
        for node in nodes:
            if self._ended:
                break
            parts.append(self._node(node, scope))
        return "".join(parts)

    def _node(self, node: Node, scope: _Scope) -> str:
        if isinstance(node, str):
            return f"{{{{ {_text(node)} }}}}"
        if not isinstance(node, Block):
            # The answer's place; what an assistant has said already (the last message may be its) stays.
            self._ended = self._cut and node == Field(("Response",))
            return f"{{{{ say({self.expression(node, scope)}) }}}}"
        match node.kind:
            case "set":
                return f"{{% set var.{node.value} = {self.expression(node.subject, scope)} %}}"
            case "break" | "continue":
                return f"{{% {node.kind} %}}"
            case "if":
                return self._if(node, scope)
            case "with":
                return self._with(node, scope)
            case _:
                return self._range(node, scope)

    def _if(self, node: Block, scope: _Scope) -> str:
        condition = self.expression(node.subject, scope)
        body = self.write(node.body, scope)
        return f"{{% if {condition} %}}{body}{self._else(node, scope)}{{% endif %}}"

    def _with(self, node: Block, scope: _Scope) -> str:
        depth = scope.depth + 1
        dot = f"dot{depth}"
        start = f"{{% set {dot} = {self.expression(node.subject, scope)} %}}{{% if {dot} %}}"
        if node.value:
            start += f"{{% set var.{node.value} = {dot} %}}"
        body = self.write(node.body, _Scope(dot, depth))
        return f"{start}{body}{self._else(node, scope)}{{% endif %}}"

    def _range(self, node: Block, scope: _Scope) -> str:
        """`range` goes over a list, or over an object in the order of its keys."""
        depth = scope.depth + 1
        dot, over, item = f"dot{depth}", f"over{depth}", f"item{depth}"
        start = (
            f"{{% set {over} = {self.expression(node.subject, scope)} %}}"
            f"{{% for {item} in ({over} | dictsort(true) if {over} is mapping else {over} or []) %}}"
            f"{{% set {dot} = {item}[1] if {over} is mapping else {item} %}}"
        )
        if node.key:
            start += f"{{% set var.{node.key} = {item}[0] if {over} is mapping else loop.index0 %}}"
        if node.value:
            start += f"{{% set var.{node.value} = {dot} %}}"
        body = self.write(node.body, _Scope(dot, depth))
        return f"{start}{body}{self._else(node, scope)}{{% endfor %}}"

    def _else(self, node: Block, scope: _Scope) -> str:
        """Written after the body, which may have ended it all (see `cut`): then there is nothing in it."""
        return f"{{% else %}}{self.write(node.otherwise, scope)}" if node.otherwise else ""

    def expression(self, e: Expression | None, scope: _Scope) -> str:
        match e:
            case Literal(value):
                return _text(value) if isinstance(value, str) else json.dumps(value).replace("null", "none")
            case Variable(name, path):
                return self._path(path, _Scope()) if not name else f"var.{name}" + _tail(path)
            case Field(path, None):
                return self._path(path, scope)
            case Field(path, of):
                return f"({self.expression(of, scope)})" + _tail(path)
            case Call(name, arguments):
                return self._call(name, [self.expression(a, scope) for a in arguments])
        raise AssertionError(e)

    def _path(self, path: tuple[str, ...], scope: _Scope) -> str:
        if scope.dot:
            return scope.dot + _tail(path)
        if not path:
            return "none"
        return self._root.get(path[0], "none") + (_tail(path[1:]) if path[0] in self._root else "")

    def _call(self, name: str, given: list[str]) -> str:
        match name, given:
            case (("and" | "or"), [_, *_]):
                return "(" + f" {name} ".join(given) + ")"
            case "not", [one]:
                return f"(not {one})"
            case "eq", [one, *others] if others:
                return "(" + " or ".join(f"{one} == {other}" for other in others) + ")"
            case _, [one, two] if name in _COMPARE:
                return f"({one} {_COMPARE[name]} {two})"
            case "len", [one]:
                return f"({one} | length)"
            case "index", [one, *keys] if keys:
                return one + "".join(f"[{key}]" for key in keys)
            case "slice", [one, *ends] if 1 <= len(ends) <= 2:
                return f"{one}[{':'.join([*ends, ''][:2])}]"
            case "json", [one]:
                return f"({one} | tojson(separators=(',', ':')))"
            case "printf", [form, *values] if re.fullmatch(r'"(?:[^%"\\]|\\.|%[sdv%])*"', form):
                return f"({re.sub('%[dv]', '%s', form)} | format({', '.join(f'say({v})' for v in values)}))"
            case "print", values:
                return "(" + " ~ ".join(values or ["''"]) + ")"
            case "currentDate", _:
                return "strftime_now('%Y-%m-%d')"
        raise Refused(400, f"template error: cannot use {name} with {len(given)} values", param="template")


def _tail(path: tuple[str, ...]) -> str:
    return "".join(f"[{_text(_FIELDS.get(name, name.lower()))}]" for name in path)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
