"""JSON as models write it: strict, in pieces, and with text around it."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from alight.tools.types import ToolCall

_STRING = re.compile(
    r"""(?:
        [^"\\]                                          # as it is
      | \\["\\/bfnrt]
      | \\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}
      | \\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}   # a pair of surrogates is one character
    )*""",
    re.VERBOSE,
)


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: also for NaN, Infinity and what is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, strict=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_first(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, and the rest."""
    text = text.lstrip()
    try:
        value, end = _DECODER.raw_decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, text[end:]


def write_json(value: Any) -> str:
    """A value as JSON text, readable for people where it can be encoded."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(value)
    return text


def call_of(value: Any) -> ToolCall:
    """The call that a JSON object describes; families differ in what they call the arguments.

    Raises:
        ValueError: it describes none.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("no object with a name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON inside of JSON, as OpenAI itself has it
        arguments = read_json(arguments or "{}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no object")
    id = value.get("id")
    return ToolCall(id if isinstance(id, str) else "", value["name"], write_json(arguments))


def inside_string(text: str) -> bool:
    """Whether a JSON text breaks off inside a string."""
    inside = escaped = False
    for char in text:
        if escaped:
            escaped = False
        elif inside and char == "\\":
            escaped = True
        elif char == '"':
            inside = not inside
    return inside


class StringStream:
    """Decodes a JSON string while it comes; begins after the opening quote."""

    def __init__(self) -> None:
        self._held = ""
        self.done = False

    def feed(self, text: str) -> str:
        """The characters that are certain. After the closing quote, `done` is set and the rest is dropped."""
        if self.done:
            return ""
        self._held += text
        match = _STRING.match(self._held)
        whole = match[0] if match else ""
        self._held = self._held[len(whole) :]
        self.done = self._held.startswith('"')
        return str(read_json(f'"{whole}"'))

    def finish(self) -> str:
        """What is no whole character or escape, as it is."""
        return "" if self.done else self._held


class ValueStream:
    """Passes on one JSON value while it comes, as it is written, and drops what follows it."""

    def __init__(self) -> None:
        self._depth = 0
        self._inside = self._escaped = self._begun = False
        self.done = False

    def feed(self, text: str) -> str:
        if self.done:
            return ""
        for at, char in enumerate(text):
            if self._ends_before(char):
                self.done = True
                return text[:at]
        return text

    def _ends_before(self, char: str) -> bool:
        if self._inside:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._inside = False
            return False
        if self._begun and self._depth == 0 and (char in ",]}" or char.isspace()):
            return True
        self._begun = self._begun or not char.isspace()
        self._inside = char == '"'
        self._depth += (char in "{[") - (char in "}]")
        return False


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant, strict=False)
