"""Tools, choices and messages from outside, checked and in one form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alight.chat import Message
from alight.errors import BadInput
from alight.tools.jsontext import read_json
from alight.tools.schema import check_schema

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
CHOICES = ("auto", "none", "required")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tools an answer may call, and whether it must.

    Attributes:
        tools: as a template gets them.
        names: of the functions that may be called.
        forced: the answer is a call.
    """

    tools: list[dict[str, Any]]
    names: list[str]
    forced: bool = False

    @property
    def functions(self) -> dict[str, Any]:
        """The JSON Schemas of the arguments by the functions' names."""
        return {tool["function"]["name"]: tool["function"]["parameters"] for tool in self.tools}


def check_tools(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: str | Mapping[str, Any] = "auto"
) -> Choice:
    """The tools, and the choice among them.

    Raises:
        BadInput: naming the field.
    """
    checked = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools or [])]
    names = [tool["function"]["name"] for tool in checked]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"tools has {names.count(name)} functions named {name!r}")
    if isinstance(tool_choice, str):
        if tool_choice not in CHOICES:
            hint = f"It must be one of {', '.join(CHOICES)}, or name a function."
            raise BadInput(f"tool_choice is {tool_choice!r}", hint=hint)
        if tool_choice == "required" and not checked:
            raise BadInput("tool_choice is 'required' but there are no tools", hint="Give `tools`.")
        if tool_choice == "none":
            checked, names = [], []
        return Choice(checked, names, forced=tool_choice == "required")
    function = tool_choice.get("function") if tool_choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise BadInput(
            f"tool_choice is {json.dumps(dict(tool_choice), default=str)}",
            hint='To name a function: {"type": "function", "function": {"name": "…"}}.',
        )
    if name not in names:
        hint = f"They are {', '.join(names)}." if names else "Give `tools`."
        raise BadInput(f"tool_choice names {name!r}, which is not among the tools", hint=hint)
    return Choice(checked, [name], forced=True)


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise BadInput(f"{where} is {type(tool).__name__}", hint="It must be an object.")
    if tool.get("type", "function") != "function":
        raise BadInput(f"{where}.type is {tool.get('type')!r}", hint="Only functions can be called here.")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise BadInput(f"{where}.function is missing", hint="It must be an object with a name.")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        hint = "It must be 1 to 64 letters, digits, _, - and dots."
        raise BadInput(f"{where}.function.name is {name!r}", hint=hint)
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise BadInput(f"{where}.function.description is {description!r}", hint="It must be text.")
    parameters = function.get("parameters")
    parameters = {"type": "object"} if parameters is None else parameters
    check_schema(parameters, f"{where}.function.parameters")
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        hint = 'Arguments are an object: {"type": "object", "properties": {…}}.'
        raise BadInput(f"{where}.function.parameters.type is not 'object'", hint=hint)
    # Many templates look into `properties` without asking whether they are there.
    parameters = {"type": "object", "properties": {}, **parameters}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with their tool calls in one form: with ids, and arguments as objects.

    What else a message has to be, the chat template checks.

    Raises:
        BadInput: naming the field.
    """
    checked: list[dict[str, Any]] = []
    waiting: list[str] = []  # the ids of calls without a result so far
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadInput(f"messages[{i}] is {type(message).__name__}", hint="It must be an object.")
        clean = dict(message)
        if calls := clean.pop("tool_calls", None):
            where = f"messages[{i}].tool_calls"
            if not isinstance(calls, Sequence) or isinstance(calls, str):
                raise BadInput(f"{where} is {type(calls).__name__}", hint="It must be a list.")
            clean["tool_calls"] = [
                _call(call, f"{where}[{j}]", f"call_{i}_{j}") for j, call in enumerate(calls)
            ]
            waiting = [call["id"] for call in clean["tool_calls"]]
        if clean.get("role") == "tool":
            # Ollama's clients send no ids: results then belong to the calls in their order.
            given = clean.get("tool_call_id")
            if given is None and waiting:
                given = waiting[0]
            clean["tool_call_id"] = str(given or "")
            waiting = [id for id in waiting if id != given]
        checked.append(clean)
    return checked


def _call(call: Any, where: str, id: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadInput(f"{where}.function.name is missing", hint="A call has a function with a name.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments or "{}")
        except ValueError as error:
            raise BadInput(f"{where}.function.arguments is not JSON: {error}") from None
    if arguments is not None and not isinstance(arguments, Mapping):
        raise BadInput(
            f"{where}.function.arguments is {type(arguments).__name__}", hint="It must be an object."
        )
    return {
        "id": call.get("id") if isinstance(call.get("id"), str) and call["id"] else id,
        "type": "function",
        "function": {"name": function["name"], "arguments": dict(arguments or {})},
    }
