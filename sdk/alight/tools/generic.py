"""For models whose template knows no tools: a system message describes them, and a schema holds the answer to
one of two forms, so that even a small model that never saw a tool writes valid calls.

    {"name": "get_weather", "arguments": {"city": "Paris"}}
    {"response": "It is sunny in Paris."}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from alight.tools.family import Family, Functions, described
from alight.tools.jsontext import StringStream, ValueStream, call_of, read_json
from alight.tools.readers import Calls, Reader
from alight.tools.schema import NAMED
from alight.tools.types import Delta

_RESPONSE = re.compile(r'\s*\{\s*"response"\s*:\s*(?=\S)')


class Generic(Family):
    call_start = '{"name": "'
    arguments_start = '", "arguments": '
    call_end = "}"

    @staticmethod
    def knows(template: str) -> bool:  # noqa: ARG004
        return True

    def describes(self) -> bool:
        return False

    def reader(self, functions: Functions, calls: Calls) -> Reader:
        return GenericReader(calls, words=True)

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return (
            f"You can call these functions:\n{described(tools)}\n\n"
            "Answer with one JSON object. To call a function:\n"
            '{"name": "function_name", "arguments": {"argument": "value"}}\n'
            "To answer the user yourself:\n"
            '{"response": "your answer"}'
        )

    def adapt(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Calls as the text the model wrote, and results as messages of the user."""
        adapted: list[dict[str, Any]] = []
        names: dict[str, str] = {}
        for message in messages:
            if message.get("role") == "tool":
                text = _result(message, names)
                if (
                    adapted and adapted[-1].get("name") == _RESULTS
                ):  # many templates want the roles to alternate
                    adapted[-1]["content"] += "\n" + text
                else:
                    adapted.append({"role": "user", "name": _RESULTS, "content": text})
            elif calls := message.get("tool_calls"):
                names |= {call["id"]: call["function"]["name"] for call in calls}
                lines = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
                if isinstance(message.get("content"), str):
                    lines.insert(0, message["content"])
                adapted.append({"role": "assistant", "content": "\n".join(line for line in lines if line)})
            else:
                adapted.append(message)
        return [
            {"role": m["role"], "content": m["content"]} if m.get("name") == _RESULTS else m for m in adapted
        ]


_RESULTS = "\0results"  # marks messages of ours; no name of a user holds a NUL


def _result(message: Mapping[str, Any], names: Mapping[str, str]) -> str:
    name = message.get("name") or names.get(str(message.get("tool_call_id")), "the function")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return f"Result of {name}: {content or ''}"


def answer_schema(functions: Functions, answer: Any) -> str:
    """The schema of an answer: a call of one of the functions, or a response.

    Args:
        answer: the schema of the response; None where it is words.
    """
    definitions: dict[str, Any] = {}
    options: list[Any] = []

    def reference(key: str, schema: Any) -> dict[str, Any]:
        definitions[key] = _moved(schema, f"#/$defs/{key}")
        return {"$ref": f"#/$defs/{key}"}

    for i, (name, schema) in enumerate(functions.items()):
        options.append(_object({"name": {"const": name}, "arguments": reference(f"arguments{i}", schema)}))
    words = {"type": "string"} if answer is None else reference("response", answer)
    options.append(_object({"response": words}))
    return json.dumps({"anyOf": options, "$defs": definitions})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _moved(schema: Any, to: str) -> Any:
    """A schema whose references to itself still hold when it lies inside of another one."""
    if isinstance(schema, list):
        return [_moved(one, to) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = to + value[1:]
        elif key in ("const", "enum", "default", "examples"):
            moved[key] = value  # data, not schemas
        elif key in NAMED and isinstance(value, dict):
            moved[key] = {name: _moved(one, to) for name, one in value.items()}
        else:
            moved[key] = _moved(value, to)
    return moved


class GenericReader(Reader):
    """Reads both forms. The response streams; a call is given when it is whole.

    Args:
        words: the response is a JSON string to be decoded; else JSON to be passed on as it is.
    """

    def __init__(self, calls: Calls, *, words: bool) -> None:
        self._calls = calls
        self._words = words
        self._held = ""
        self._response: StringStream | ValueStream | None = None
        self._text = False  # it is neither form after all

    def feed(self, text: str) -> list[Delta]:
        if self._text:
            return _text(text)
        if self._response:
            return _text(self._response.feed(text))
        self._held += text
        if match := _RESPONSE.match(self._held):
            rest = self._held[match.end() :]
            if self._words and not rest.startswith('"'):
                return self._as_text()
            self._response = StringStream() if self._words else ValueStream()
            return _text(self._response.feed(rest[1:] if self._words else rest))
        if self._held.lstrip() and not self._held.lstrip().startswith("{"):
            return self._as_text()
        return []

    def finish(self) -> list[Delta]:
        if isinstance(self._response, StringStream):
            return _text(self._response.finish())
        if self._response or self._text:
            return []
        try:
            call = call_of(read_json(self._held))
        except ValueError:
            return self._as_text()
        return self._calls.whole([call])

    def _as_text(self) -> list[Delta]:
        self._text = True
        held, self._held = self._held, ""
        return _text(held)


def _text(text: str) -> list[Delta]:
    return [Delta(text)] if text else []
