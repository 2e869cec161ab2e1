"""The items of the Responses API as the messages of the chat API, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alight.server.failures import Refused

_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")


def messages_of(items: str | Sequence[Any], where: str = "input") -> list[dict[str, Any]]:
    """The messages that some items say.

    An assistant's reasoning, words and calls are items of their own there, and one message here.

    Raises:
        Refused: 400, naming the item.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        place = f"{where}[{i}]"
        if not isinstance(item, Mapping):
            raise _refusal(place, f"is {type(item).__name__}", "It must be an object.")
        match item.get("type", "message"):
            case "message" if item.get("role") == "assistant":
                said = _assistant(messages, after=("reasoning_content",))
                said["content"] = _text(item.get("content"), f"{place}.content")
            case "message":
                role = item.get("role")
                if role not in ("user", "system", "developer"):
                    hint = "It must be user, assistant, system or developer."
                    raise _refusal(f"{place}.role", f"is {role!r}", hint)
                messages.append({"role": role, "content": _text(item.get("content"), f"{place}.content")})
            case "reasoning":
                content = item.get("content") or item.get("summary") or []
                _assistant(messages, after=())["reasoning_content"] = _text(content, f"{place}.content")
            case "function_call":
                said = _assistant(messages, after=("reasoning_content", "content", "tool_calls"))
                said.setdefault("tool_calls", []).append(_call(item, place))
            case "function_call_output":
                text = _text(item.get("output"), f"{place}.output")
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
            case kind:
                hint = "Messages, reasoning, function calls and their outputs work here."
                raise _refusal(f"{place}.type", f"is {kind!r}", hint, code="unsupported")
    return messages


def _assistant(messages: list[dict[str, Any]], after: Sequence[str]) -> dict[str, Any]:
    """The assistant's last message if it has nothing but `after` so far; else a new one."""
    last = messages[-1] if messages else {}
    free = "content" in after or not last.get("content")
    if last.get("role") == "assistant" and free and {*last} <= {"role", "content", *after}:
        return last
    messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _call(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    for key in ("call_id", "name", "arguments"):
        if not isinstance(item.get(key), str):
            raise _refusal(f"{place}.{key}", "is missing", "It must be text.")
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refusal(place, f"is {type(content).__name__}", "It must be text, or a list of parts.")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS:
            raise _refusal(
                f"{place}[{i}]", f"is of type {kind!r}", "Only text works here.", code="unsupported"
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise _refusal(f"{place}[{i}]", "has no text", "")
        texts.append(text)
    return "".join(texts)


def _refusal(place: str, what: str, hint: str, code: str = "invalid_request") -> Refused:
    return Refused(400, f"{place} {what}", hint=hint, code=code, param=place.partition("[")[0])
