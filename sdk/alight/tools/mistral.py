"""Mistral, before and after 2025:

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "a1b2c3d4e"}]
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}

Some of the newer ones put [CALL_ID]a1b2c3d4e between name and arguments. The ids have nine letters and digits,
which the templates insist on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from alight.tools.family import Family, Functions
from alight.tools.jsontext import call_of, read_first, write_json
from alight.tools.readers import Calls, MarkedReader, Markup, Reader, short_id
from alight.tools.types import ToolCall

CALLS, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w*)\s*)?(?:\[ARGS\])?\s*(?=\{)")


class Mistral(Family):
    marks = (CALLS, ID, ARGUMENTS)
    short_ids = True

    def __init__(self, template: str) -> None:
        super().__init__(template)
        self._new = ARGUMENTS in template
        self.call_start = CALLS if self._new else CALLS + '[{"name": "'
        self.arguments_start = ARGUMENTS if self._new else '", "arguments": '
        if ID in template:
            self.arguments_start = ID + short_id() + ARGUMENTS
        self.call_end = "" if self._new else "}]"
        self.name_end = ARGUMENTS if self._new else '"'

    @staticmethod
    def knows(template: str) -> bool:
        return CALLS in template

    def reader(self, functions: Functions, calls: Calls) -> Reader:
        return MarkedReader(Markup(CALLS, "", _read), calls)

    def adapt(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        adapted = []
        for message in messages:
            message = dict(message)
            if "tool_call_id" in message:
                message["tool_call_id"] = _shortened(message["tool_call_id"])
            if "tool_calls" in message:
                message["tool_calls"] = [
                    {**call, "id": _shortened(call["id"])} for call in message["tool_calls"]
                ]
            adapted.append(message)
        return adapted


def _read(text: str) -> tuple[list[ToolCall], str]:
    if text.lstrip().startswith(("[", "{")):
        value, rest = read_first(text)
        values = value if isinstance(value, list) else [value]
        return [call_of(one) for one in values], rest
    head = _HEAD.match(text)
    if not head:
        raise ValueError("no name and arguments")
    arguments, rest = read_first(text[head.end() :])
    return [ToolCall(head[2] or "", head[1], write_json(arguments))], rest


def _shortened(id: Any) -> str:
    """An id from elsewhere as nine letters and digits, always the same."""
    text = str(id)
    return text if _SHORT_ID.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:9]
