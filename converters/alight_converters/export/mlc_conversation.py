"""MLC's conversation template, found out from a model's chat template.

mlc_llm and web-llm build prompts from a handful of texts instead of running a template: what stands before a role's
message, and what after it. Here these texts are read off conversations that the model's own template renders.
(alight's own target runs the model's template and does not need them.)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alight.chat import ChatTemplate
from alight.errors import BadInput

log = logging.getLogger(__name__)

# mlc_llm always writes a system message. Where the model's template has none of its own, its presets have this.
DEFAULT_SYSTEM = "You are a helpful assistant."
SYSTEM = "{system_message}"  # where it goes

# Words that no template has, and that none changes.
_BEGIN, _RULE, _QUESTION, _ANSWER, _NEXT, _THOUGHT = (
    f"alight{word}7" for word in ("Begin", "Rule", "Question", "Answer", "Next", "Thought")
)
_ASK = [("user", _QUESTION)]
_TURNS = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT)]
_RULED = [("system", _RULE)]
# Llama 3.1 and later name the day. A frozen day would be wrong; this is what they say where there is no clock.
_VARIABLES = {"date_string": "26 Jul 2024"}

Messages = Sequence[tuple[str, str]]  # (role, content)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a conversation needs to know of a tokenizer.

    Attributes:
        added: ids of its added tokens, by their texts.
        bos: the text of the beginning token; empty where there is none.
        adds_bos: whether it puts `bos` before every text.
        ends: ids that end an answer, as the model's files say.
    """

    added: Mapping[str, int]
    bos: str
    adds_bos: bool
    ends: tuple[int, ...]


def conversation(source: str, tokens: Tokens) -> dict[str, Any]:
    """The `conv_template` of `mlc-chat-config.json`.

    Args:
        source: the model's chat template, in Jinja. Empty for a base model; its texts get no roles.
    """
    if not source:
        return _plain(tokens)
    template = _Template(source, tokens)
    try:
        found = _derive(template, tokens)
    except BadInput as error:
        log.warning("mlc_llm and web-llm get no roles for this model: %s", error.message)
        return _plain(tokens)
    for messages in ([*_RULED, *_ASK], [*_RULED, *_TURNS], _TURNS):
        expected = template.tries(messages)
        unsaid = messages is _TURNS and found["system_message"] == DEFAULT_SYSTEM
        if expected is not None and not unsaid and prompt(found, messages) != expected:
            roles = ", ".join(role for role, _ in messages)
            log.warning("mlc_llm and web-llm build another prompt than the model's template for %s", roles)
            break
    return found


def prompt(conversation: Mapping[str, Any], messages: Messages) -> str:
    """What mlc_llm asks a model with, less `system_prefix_token_ids`: the messages, and the start of an answer."""
    rule = messages[0][1] if messages[0][0] == "system" else conversation["system_message"]
    text = str(conversation["system_template"]).replace(SYSTEM, rule)
    roleless = bool(text) and not conversation["add_role_after_system_message"]
    roles, seps = conversation["roles"], conversation["seps"]
    for number, (role, content) in enumerate(m for m in messages if m[0] != "system"):
        if number or not roleless:
            text += roles[role] + conversation["role_content_sep"]
        text += content + seps[number % len(seps)]
    return f"{text}{roles['assistant']}{conversation['role_empty_sep']}"


class _Template:
    """The model's template; `begins` tells after the first rendering whether prompts begin with `bos`."""

    def __init__(self, source: str, tokens: Tokens) -> None:
        self._jinja = ChatTemplate(source, bos=_BEGIN, eos=_text(tokens, tokens.ends[:1]))
        self._bos = tokens.bos
        self.begins = False

    def renders(self, messages: Messages) -> str:
        """The prompt without a `bos` at its start, which MLC gives as an id. Raises BadInput if it is refused."""
        pieces = self._jinja.render(
            [{"role": role, "content": content} for role, content in messages], variables=_VARIABLES
        )
        text = "".join(str(piece) for piece in pieces)
        self.begins = text.startswith(_BEGIN)
        return text.removeprefix(_BEGIN).replace(_BEGIN, self._bos)

    def tries(self, messages: Messages) -> str | None:
        try:
            return self.renders(messages)
        except BadInput:
            return None


def _derive(template: _Template, tokens: Tokens) -> dict[str, Any]:
    start, between, after, last = _cut(template.renders(_TURNS), _QUESTION, _ANSWER, _NEXT)
    end = _end(between, after, tokens)
    if after.endswith(start):  # the prompt begins with the user's turn
        user, answer_end = start, after.removesuffix(start)
    else:  # there is a system message that nobody gave
        answer_end = _leading(after, end)
        user = after.removeprefix(answer_end)
    question_end = _leading(between, end)
    if not last.startswith(question_end):
        question_end = ""
    assistant, begun = between.removeprefix(question_end), last.removeprefix(question_end)
    space = _shared_space(user, assistant)
    role = assistant.removesuffix(space)
    if not start.endswith(user) or not begun.startswith(role):
        raise BadInput("its template does not write all turns alike")
    return _whole(
        tokens,
        **_system(template, start, user),
        begins=template.begins,
        roles={"user": user.removesuffix(space), "assistant": role},
        seps=[question_end] if question_end == answer_end else [question_end, answer_end],
        role_content_sep=space,
        role_empty_sep=begun.removeprefix(role),
        end=end,
        strip_reasoning_in_history=_drops_thoughts(template),
    )


def _system(template: _Template, start: str, user: str) -> dict[str, Any]:
    """How a system message is written, and the one that stands where nobody gives one."""
    with_rule = template.tries([*_RULED, *_ASK]) or ""
    try:
        before, after, _ = _cut(with_rule, _RULE, _QUESTION)
    except BadInput:  # Gemma 2 knows none
        return {"system_template": start.removesuffix(user) + SYSTEM, "system_message": ""}
    usual = DEFAULT_SYSTEM
    if start.startswith(before) and start.endswith(after) and len(start) >= len(before) + len(after):
        usual = start[len(before) : len(start) - len(after)]
    own_turn = after.endswith(user)
    return {
        "system_template": before + SYSTEM + (after.removesuffix(user) if own_turn else after),
        "system_message": usual,
        "add_role_after_system_message": own_turn,
    }


def _drops_thoughts(template: _Template) -> bool:
    thought = ("assistant", f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWER}")
    text = template.tries([*_ASK, thought, ("user", _NEXT)]) or ""
    return _ANSWER in text and _THOUGHT not in text


def _cut(text: str, *words: str) -> list[str]:
    """What stands around the words. Raises BadInput unless each is there once, in this order."""
    parts = re.split("|".join(words), text)
    if re.findall("|".join(words), text) != list(words):
        raise BadInput("its template does not write messages one after the other")
    return parts


def _end(between: str, after: str, tokens: Tokens) -> str:
    """The control token that ends an answer; empty where there is none."""
    first = _first_token(after, tokens)
    ends = tokens.added.get(first) in tokens.ends or first == _first_token(between, tokens)
    return first if ends else ""


def _first_token(text: str, tokens: Tokens) -> str:
    beginnings = [token for token in tokens.added if text.lstrip().startswith(token)]
    return max(beginnings, key=len, default="")


def _leading(text: str, end: str) -> str:
    """The part of `text` that ends the turn before it."""
    found = re.match(rf"\s*{re.escape(end)}\s*", text) or re.match(r"\s*", text)
    return found[0] if found else ""


def _shared_space(first: str, second: str) -> str:
    """The spaces that both texts end with."""
    space = first[len(first.rstrip()) :]
    while not second.endswith(space):
        space = space[1:]
    return space


def _plain(tokens: Tokens) -> dict[str, Any]:
    return _whole(
        tokens,
        system_template=SYSTEM,
        system_message="",
        begins=tokens.adds_bos,
        roles={"user": "", "assistant": ""},
        seps=[""],
        role_content_sep="",
        role_empty_sep="",
        end="",
        strip_reasoning_in_history=False,
    )


def _whole(tokens: Tokens, *, begins: bool, end: str, **found: Any) -> dict[str, Any]:
    """All fields, in the form of mlc_llm's `Conversation`."""
    bos = tokens.added.get(tokens.bos)
    ends = {*tokens.ends, *(tokens.added[token] for token in (end,) if token)}
    return {
        "name": "alight",
        "system_prefix_token_ids": [bos] if begins and bos is not None else None,
        "add_role_after_system_message": True,
        "role_templates": {
            "user": "{user_message}",
            "assistant": "{assistant_message}",
            "tool": "{tool_message}",
        },
        "messages": [],
        "stop_str": [end] if end else [],
        "stop_token_ids": sorted(ends),
        "function_string": "",
        "use_function_calling": False,
        **found,
    }


def _text(tokens: Tokens, ids: tuple[int, ...]) -> str:
    """The text of the first of these ids that is an added token."""
    return next((text for text, number in tokens.added.items() if number in ids), "")
