"""Calls in XML, as Qwen 3 Coder, Qwen 3.5 and Nemotron 3 write them:

<tool_call>
<function=get_weather>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import re
from typing import Any

from alight.tools.family import Family, Functions
from alight.tools.hermes import END, START, bare_calls, read_marked
from alight.tools.jsontext import read_json, write_json
from alight.tools.readers import Calls, MarkedReader, Markup, Reader
from alight.tools.types import ToolCall

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*|$)", re.DOTALL)
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|$)\s*", re.DOTALL
)


class XmlCalls(Family):
    marks = (START, END)
    # A call that is forced is written as JSON, which these models know as well: its arguments follow a schema.
    call_start = START + '\n{"name": "'
    arguments_start = '", "arguments": '
    call_end = "}\n" + END

    @staticmethod
    def knows(template: str) -> bool:
        return START in template and "<function=" in template

    def reader(self, functions: Functions, calls: Calls) -> Reader:
        def read(text: str) -> tuple[list[ToolCall], str]:
            return _read(text, functions)

        return MarkedReader(Markup(START, END, read, bare=bare_calls(functions), json=False), calls)


def _read(text: str, functions: Functions) -> tuple[list[ToolCall], str]:
    match = _FUNCTION.fullmatch(text)
    if not match:
        return read_marked(text)
    name, body = match[1].strip(), match[2]
    schema = functions.get(name)
    types = schema.get("properties", {}) if isinstance(schema, dict) else {}
    arguments = {}
    at = 0
    for parameter in _PARAMETER.finditer(body):
        if parameter.start() != at:
            break
        at = parameter.end()
        arguments[parameter[1].strip()] = _value(parameter[2], types.get(parameter[1].strip()))
    if body[at:].strip():
        raise ValueError("no parameters")
    return [ToolCall("", name, write_json(arguments))], ""


def _value(text: str, schema: Any) -> Any:
    """A parameter's value: text where the schema says so, else JSON if it is some."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return read_json(text)
    except ValueError:
        return text
