"""Reasoning: how a template marks it, and how it is switched on and off."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from alight.chat import ChatTemplate

_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CODE = re.compile(r"\{%.*?%\}|\{\{.*?\}\}", re.DOTALL)
_STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_SWITCH = re.compile(r"(?<![\w.])(enable_)?thinking\b")


@dataclass(frozen=True, slots=True)
class Thinking:
    """The tags around reasoning.

    Attributes:
        switch: the template has a variable that turns it on and off.
    """

    start: str
    end: str
    switch: bool

    def opened(self, prompt: str) -> bool:
        """Whether a prompt ends inside of the reasoning."""
        return prompt.rstrip().endswith(self.start)

    def closed(self, prompt: str) -> bool:
        """Whether a prompt ends after (empty) reasoning."""
        return prompt.rstrip().endswith(self.end)

    @staticmethod
    def variables(think: bool | None) -> dict[str, Any]:
        """What to tell the template. Models disagree about the name."""
        return {} if think is None else {"enable_thinking": think, "thinking": think}


def thinking_of(template: ChatTemplate) -> Thinking | None:
    """How models with this template reason; None where they do not."""
    return _thinking_of(template.source)


@lru_cache(maxsize=32)
def _thinking_of(source: str) -> Thinking | None:
    source = _COMMENT.sub("", source)
    for start, end in _TAGS:
        if start in source or end in source:
            code = (_STRING.sub("", tag[0]) for tag in _CODE.finditer(source))
            return Thinking(start, end, any(_SWITCH.search(tag) for tag in code))
    return None
