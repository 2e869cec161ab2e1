"""A conversation with tools, made ready for a model."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alight.chat import ChatTemplate, Message
from alight.errors import Unsupported
from alight.target import Chunk, Model, Sampling
from alight.tools.check import check_messages, check_tools
from alight.tools.deepseek import DeepSeek
from alight.tools.family import Family, with_instructions
from alight.tools.generic import Generic, GenericReader, answer_schema
from alight.tools.hermes import Hermes
from alight.tools.llama3 import Llama3
from alight.tools.mistral import Mistral
from alight.tools.readers import Calls, ForcedReader, PlainReader, Reader, ThinkReader
from alight.tools.schema import parse_schema
from alight.tools.steps import Force, run_steps
from alight.tools.thinking import Thinking, thinking_of
from alight.tools.types import AnswerParser
from alight.tools.xml_calls import XmlCalls

# The first that knows a template has it.
FAMILIES: tuple[type[Family], ...] = (DeepSeek, Mistral, XmlCalls, Hermes, Llama3, Generic)


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """What to generate from, how, and what reads the answer.

    Use `generate`: it sets the fields of Sampling, and takes more than one step where a call is forced, or
    where reasoning comes before an answer that has to follow a schema.

    Attributes:
        tokens: the prompt; images stand among them as the bytes of their files.
        parser: reads this one answer.
        keep_special: control tokens that `parser` has to see.
        reasons_first: the tag that ends the reasoning before what json_schema or `force` is about.
        force: the call that the answer has to be.
    """

    tokens: list[int | bytes]
    parser: AnswerParser
    json_schema: str = ""
    keep_special: tuple[str, ...] = ()
    reasons_first: str = ""
    force: Force | None = None

    def generate(self, model: Model, sampling: Sampling) -> Generator[Chunk]:
        """The chunks of the answer; feed their text to `parser`. Closing the iterator cancels."""
        sampling = replace(sampling, keep_special=(*sampling.keep_special, *self.keep_special))
        return run_steps(
            model,
            self.tokens,
            sampling,
            json_schema=self.json_schema,
            reasons_first=self.reasons_first,
            force=self.force,
        )


def prepare_chat(
    model: Model,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] = "auto",
    parallel: bool = True,
    json_schema: str = "",
    think: bool | None = None,
) -> PreparedChat:
    """Render a conversation with tools through the model's template.

    Args:
        messages: as OpenAI has them; `arguments` of `tool_calls` may also be objects, as at Ollama.
        tools: as OpenAI has them: {"type": "function", "function": {"name", "description", "parameters"}}.
        tool_choice: "auto", "none", "required", or {"type": "function", "function": {"name": …}}.
        parallel: whether one answer may hold several calls.
        json_schema: a JSON Schema, as JSON text, that an answer in words must follow; "{}" is any object.
        think: whether the model reasons before it answers; None leaves that to it.

    Raises:
        BadInput: naming the field that cannot be used. Unsupported: the model has no chat template, or
            `think` is true and it does not know how.
    """
    choice = check_tools(tools, tool_choice)
    conversation = check_messages(messages)
    answer_form = parse_schema(json_schema, "json_schema") if json_schema else None
    thinking = thinking_of(model.template)
    if think and not thinking:
        raise Unsupported(
            f"{model.info.name!r} does not think", hint="Leave that out, or take another model."
        )

    family = family_of(model.template)
    if choice.tools and answer_form is not None and not choice.forced:
        # The schema has to allow for calls, too; only this family's markup is JSON through and through.
        family = Generic(model.template.source)
    calls = Calls(parallel=parallel, short_ids=family.short_ids)
    reader: Reader = PlainReader()
    force: Force | None = None
    if choice.forced:
        json_schema, reader = "", ForcedReader(None, calls)
        functions = choice.functions
        force = Force(family, {name: json.dumps(functions[name]) for name in choice.names})
    elif choice.tools and isinstance(family, Generic):
        json_schema = answer_schema(choice.functions, answer_form)
        reader = GenericReader(calls, words=answer_form is None)
    elif choice.tools:
        reader = family.reader(choice.functions, calls)

    constrained = bool(json_schema or force)
    prompt = _Prompt(model.template, family, conversation, choice.tools)
    pieces, opened = prompt.render(thinking, think, constrained)
    reasons_first = ""
    if thinking:
        if constrained and think and not opened:
            pieces.append(thinking.start + "\n")
            opened = True
        reasons_first = thinking.end if constrained and opened else ""
        reader = ThinkReader(reader, thinking.start, thinking.end, inside=opened)
    marks = family.marks if choice.tools else ()
    return PreparedChat(
        tokens=model.prompt_tokens(pieces),
        parser=reader,
        json_schema=json_schema,
        keep_special=(*marks, *((thinking.start, thinking.end) if thinking else ())),
        reasons_first=reasons_first,
        force=force,
    )


@dataclass(frozen=True, slots=True)
class _Prompt:
    template: ChatTemplate
    family: Family
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]

    def render(
        self, thinking: Thinking | None, think: bool | None, constrained: bool
    ) -> tuple[list[str | bytes], bool]:
        """The pieces of the prompt, and whether they end inside of reasoning."""
        pieces = self._render(think)
        if not thinking:
            return pieces, False
        opened = thinking.opened(_text(pieces))
        if think is None and constrained and not opened and thinking.switch:
            # The model would choose to reason, but a schema leaves no room for it.
            think, pieces = False, self._render(False)
            opened = thinking.opened(_text(pieces))
        if think is False:
            text = _text(pieces)
            if opened:
                pieces.append(f"\n{thinking.end}\n\n")
            elif not thinking.closed(text) and not thinking.switch:
                pieces.append(f"{thinking.start}\n\n{thinking.end}\n\n")
            opened = False
        return pieces, opened

    def _render(self, think: bool | None) -> list[str | bytes]:
        family, messages, tools = self.family, self.messages, self.tools
        adapted = family.adapt(messages)
        if tools and not family.describes():
            adapted = with_instructions(adapted, family.instructions(tools), self.template.source)
            tools = []
        return self.template.render(
            adapted, tools=tools, variables=Thinking.variables(think), keep_null=family.null_content
        )


def _text(pieces: Sequence[str | bytes]) -> str:
    """A rendered prompt without its images."""
    return "".join(piece for piece in pieces if isinstance(piece, str))


def family_of(template: ChatTemplate) -> Family:
    """How models with this template write tool calls."""
    return next(family(template.source) for family in FAMILIES if family.knows(template.source))


def can_think(template: ChatTemplate) -> bool:
    """Whether models with this template reason before they answer."""
    return thinking_of(template) is not None


def can_call_tools(template: ChatTemplate) -> bool:
    """Whether the template itself knows tools. Others get them described in a system message."""
    return not isinstance(family_of(template), Generic)
