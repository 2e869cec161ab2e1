"""ChatML with Hermes' tool calls, as Hermes, Qwen 2.5, Qwen 3, QwQ, Granite 4 and many others write them:

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

import re
from typing import Any

from alight.tools.family import Family, Functions
from alight.tools.jsontext import call_of, read_first, read_json
from alight.tools.readers import Calls, MarkedReader, Markup, ReadCalls, Reader
from alight.tools.types import ToolCall

START, END = "<tool_call>", "</tool_call>"
_JSON_CALL = re.compile(r"""\\?"arguments\\?": ?""")  # others (GLM) have something else between these tags


class Hermes(Family):
    marks = (START, END)
    call_start = START + '\n{"name": "'
    arguments_start = '", "arguments": '
    call_end = "}\n" + END

    @staticmethod
    def knows(template: str) -> bool:
        return START in template and _JSON_CALL.search(template) is not None

    def reader(self, functions: Functions, calls: Calls) -> Reader:
        return MarkedReader(Markup(START, END, read_marked, bare=bare_calls(functions)), calls)


def read_marked(text: str) -> tuple[list[ToolCall], str]:
    """One JSON object, or a list of them."""
    value = read_json(text)
    return [call_of(one) for one in (value if isinstance(value, list) else [value])], ""


def bare_calls(functions: Functions) -> ReadCalls:
    """Reads JSON objects without markup: those that name a function of ours are calls."""

    def read(text: str) -> tuple[list[ToolCall], str]:
        calls: list[ToolCall] = []
        rest = text.strip()
        while rest.startswith("{"):
            value, rest = read_first(rest)
            calls.append(_known(value, functions))
            rest = rest.lstrip(" \t\r\n;,")  # what models put between two calls
        if not calls:
            raise ValueError("no call")
        return calls, rest

    return read


def _known(value: Any, functions: Functions) -> ToolCall:
    call = call_of(value)
    if call.name not in functions:
        raise ValueError(f"no function {call.name}")
    return call
