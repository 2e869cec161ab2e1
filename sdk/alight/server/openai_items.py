"""The items of the Responses API as the messages of the chat API, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alight.server.failures import Refused
from alight.server.images import image_part, read_url

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
                messages.append({"role": role, "content": _content(item.get("content"), f"{place}.content")})
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


def _content(content: Any, place: str) -> str | list[dict[str, Any]]:
    """What a user says: text, or texts and images."""
    if not isinstance(content, list) or not any(_is_image(part) for part in content):
        return _text(content, place)
    parts = []
    for i, part in enumerate(content):
        where = f"{place}[{i}]"
        if not _is_image(part):
            parts.append({"type": "text", "text": _text([part], place, first=i)})
        elif part.get("file_id"):
            raise _refusal(where, "names a file", "Send the image in `image_url`.", code="unsupported")
        else:
            parts.append(image_part(read_url(part.get("image_url"), f"{where}.image_url")))
    return parts


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "input_image"


def _text(content: Any, place: str, first: int = 0) -> str:
    """The text of a content; `first` is the number of its first part."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refusal(place, f"is {type(content).__name__}", "It must be text, or a list of parts.")
    texts = []
    for i, part in enumerate(content, first):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS:
            raise _refusal(
                f"{place}[{i}]", f"is of type {kind!r}", "Text and images work here.", code="unsupported"
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise _refusal(f"{place}[{i}]", "has no text", "")
        texts.append(text)
    return "".join(texts)


def _refusal(place: str, what: str, hint: str, code: str = "invalid_request") -> Refused:
    return Refused(400, f"{place} {what}", hint=hint, code=code, param=place.partition("[")[0])
