"""Tool calls and reasoning: each model family writes them in its own markup; here they become data.

    prepared = prepare_chat(model, messages, tools=tools)
    for chunk in prepared.generate(model, Sampling()):
        for delta in prepared.parser.feed(chunk.text):
            ...  # delta.text, delta.reasoning or delta.call
    rest = prepared.parser.finish()

`Answer.of(deltas)` puts the pieces together. `can_think` and `can_call_tools` say what a template knows.
"""

from __future__ import annotations

from alight.tools.check import check_tools
from alight.tools.prepare import PreparedChat, can_call_tools, can_think, prepare_chat
from alight.tools.schema import check_schema
from alight.tools.types import Answer, AnswerParser, Delta, ToolCall, ToolCallDelta

__all__ = [
    "Answer",
    "AnswerParser",
    "Delta",
    "PreparedChat",
    "ToolCall",
    "ToolCallDelta",
    "can_call_tools",
    "can_think",
    "check_schema",
    "check_tools",
    "prepare_chat",
]
