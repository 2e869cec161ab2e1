"""What a template family is: how its models write tool calls."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from alight.tools.readers import Calls, Reader

# Names of the functions and the JSON Schemas of their arguments.
Functions: TypeAlias = Mapping[str, Any]


class Family(ABC):
    """One way of writing tool calls. A file per family; the first whose `knows` says yes is taken.

    Attributes:
        marks: markup that may be control tokens, to be shown in the text all the same.
        call_start, arguments_start, call_end: what a call has before its name, between name and arguments, and
            at its end. A call that is forced is begun with them; the model goes on with the arguments as JSON.
        name_end: what the model writes after a name it chooses.
        null_content: a message with nothing but calls has to have `content: null`, not "".
    """

    marks: ClassVar[tuple[str, ...]] = ()
    call_start: str
    arguments_start: str
    call_end: str
    name_end: str = '"'
    null_content: ClassVar[bool] = False
    short_ids: ClassVar[bool] = False

    def __init__(self, template: str) -> None:
        self.template = template

    @staticmethod
    @abstractmethod
    def knows(template: str) -> bool:
        """Whether a template is of this family."""

    @abstractmethod
    def reader(self, functions: Functions, calls: Calls) -> Reader:
        """What reads an answer that may hold calls."""

    def describes(self) -> bool:
        """Whether the template itself tells the model of the tools."""
        return re.search(r"\btools\b", self.template) is not None

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Tells the model of the tools, where the template does not."""
        start, end = self.call_start + "function_name" + self.arguments_start, self.call_end
        return (
            f"You can call these functions to answer the user:\n{described(tools)}\n\n"
            "To call one, write exactly this, with its name and its arguments as JSON:\n"
            f'{start}{{"argument": "value"}}{end}'
        )

    def adapt(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the template wants them. `arguments` come as objects."""
        return list(messages)


def described(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools as a model reads them: a JSON line each."""
    return "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)


def with_instructions(messages: Sequence[dict[str, Any]], text: str, template: str) -> list[dict[str, Any]]:
    """The messages with a text in the system message; in the first of the user where the template has none."""
    refuses = re.search(r"raise_exception\(\s*['\"][^'\"]*system", template, re.IGNORECASE)
    role = "user" if refuses or "system" not in template else "system"
    first = messages[0] if messages else {}
    if first.get("role") in (role, "developer" if role == "system" else role):
        return [{**first, "content": _joined(first.get("content"), text, role)}, *messages[1:]]
    return [{"role": role, "content": text}, *messages]


def _joined(content: Any, text: str, role: str) -> Any:
    """Text added to a message's content: after a system message's, before a user's, whose question ends it."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    if not parts:
        return text
    last = role == "system"
    ours = {"type": "text", "text": f"\n\n{text}" if last else f"{text}\n\n"}
    return [*parts, ours] if last else [ours, *parts]
