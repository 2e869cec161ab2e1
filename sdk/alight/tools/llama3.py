"""Llama 3.1, 3.2 and 3.3: the whole answer is the call, a JSON object whose arguments are "parameters":

    {"name": "get_weather", "parameters": {"city": "Paris"}}

Sometimes <|python_tag|> stands before it; several are separated by ";".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alight.tools.family import Family, Functions
from alight.tools.hermes import bare_calls
from alight.tools.readers import Calls, MarkedReader, Markup, Reader

TAG = "<|python_tag|>"


class Llama3(Family):
    marks = (TAG,)
    call_start = '{"name": "'
    arguments_start = '", "parameters": '
    call_end = "}"

    @staticmethod
    def knows(template: str) -> bool:
        return "<|start_header_id|>" in template and "ipython" in template and '"parameters": ' in template

    def reader(self, functions: Functions, calls: Calls) -> Reader:
        read = bare_calls(functions)
        return MarkedReader(Markup(TAG, "", read, bare=read), calls)

    def adapt(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The template refuses a message with several calls: each becomes a message, followed by its result."""
        adapted: list[dict[str, Any]] = []
        rest = list(messages)
        while rest:
            message = rest.pop(0)
            calls = message.get("tool_calls") or []
            if len(calls) < 2:
                adapted.append(message)
                continue
            results = []
            while rest and rest[0].get("role") == "tool":
                results.append(rest.pop(0))
            for i, call in enumerate(calls):
                content = message.get("content") if i == 0 else ""
                adapted.append({**message, "content": content, "tool_calls": [call]})
                adapted += [result for result in results if result.get("tool_call_id") == call["id"]]
            known = {call["id"] for call in calls}
            adapted += [result for result in results if result.get("tool_call_id") not in known]
        return adapted
