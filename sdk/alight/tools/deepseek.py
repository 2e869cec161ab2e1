"""DeepSeek R1 and its distillations, and V3.1:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
    ```json
    {"city": "Paris"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

V3.1 writes …begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜> instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from alight.tools.family import Family, Functions
from alight.tools.jsontext import read_json, write_json
from alight.tools.readers import Calls, MarkedReader, Markup, Reader
from alight.tools.types import ToolCall

ALL, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, SEPARATOR, ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

_AS_OBJECT = re.compile(r"(arguments['\"\]]*|tool_args)\s*\|\s*tojson")


class DeepSeek(Family):
    marks = (ALL, ALL_END, ONE, SEPARATOR, ONE_END)
    null_content = True

    def __init__(self, template: str) -> None:
        super().__init__(template)
        self._fenced = "```json" in template
        self.call_start = ALL + ONE + (f"function{SEPARATOR}" if self._fenced else "")
        self.arguments_start = "\n```json\n" if self._fenced else SEPARATOR
        self.call_end = ("\n```" if self._fenced else "") + ONE_END + ALL_END
        self.name_end = "\n" if self._fenced else SEPARATOR

    @staticmethod
    def knows(template: str) -> bool:
        return ONE in template

    def reader(self, functions: Functions, calls: Calls) -> Reader:
        return MarkedReader(Markup(ONE, ONE_END, _read, drop=(ALL, ALL_END)), calls)

    def adapt(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Calls without words have null content; some versions of the template want the arguments as text."""
        adapted = []
        for message in messages:
            if calls := message.get("tool_calls"):
                if not _AS_OBJECT.search(self.template):
                    calls = [{**call, "function": _as_text(call["function"])} for call in calls]
                message = {**message, "tool_calls": calls, "content": message.get("content") or None}
            adapted.append(message)
        return adapted


def _as_text(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": write_json(function["arguments"])}


def _read(text: str) -> tuple[list[ToolCall], str]:
    kind, separator, rest = text.partition(SEPARATOR)
    if not separator:
        raise ValueError("no separator")
    name, fence, body = rest.partition("```json")
    if fence:
        body = body.strip().removesuffix("```")
    else:
        name, body = kind, rest
    arguments = read_json(body)
    if not name.strip() or not isinstance(arguments, dict):
        raise ValueError("no name, or no object")
    return [ToolCall("", name.strip(), write_json(arguments))], ""
