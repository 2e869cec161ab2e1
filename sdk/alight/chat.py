"""Conversations to prompts: a model's own chat template, rendered in a sandbox.

The template (Jinja, as Hugging Face and GGUF files carry it) is code from outside, so it runs in
Jinja's immutable sandbox. Text from users must not forge control tokens: see `ChatTemplate.render`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from alight.errors import BadInput, InvalidModelFile, Unsupported

if TYPE_CHECKING:
    import jinja2

Message: TypeAlias = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

# A private-use character that marks the inside of a control token's text in a message.
_BREAK = "\ue0a1"


class ChatTemplate:
    """The chat template of one model.

    Args:
        source: the Jinja text; empty where the model has none (then `render` is an error).
        bos, eos: the texts of the beginning and end tokens, which templates name.
        control_tokens: the texts of all control tokens, such as "<|im_start|>".
    """

    def __init__(
        self, source: str, *, bos: str = "", eos: str = "", control_tokens: Iterable[str] = ()
    ) -> None:
        self.source = source
        self.bos = bos
        self.eos = eos
        self.control_tokens = tuple(control_tokens)
        texts = sorted({t for t in self.control_tokens if len(t) > 1}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, texts))) if texts else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        keep_null: bool = False,
    ) -> list[str]:
        """The prompt that asks for the assistant's next message.

        Returns it in pieces, to be tokenized one by one with control tokens recognised. Usually there is
        one piece. Where a message or tool holds the text of a control token, the prompt is cut inside that
        text, so that it cannot become the token: a user who types "<|im_end|>" stays a user.

        Args:
            tools: as OpenAI has them, for templates that know tools.
            variables: what else the template may ask for, such as `enable_thinking`.
            keep_null: hand `content: null` on as it is and not as an empty text: some templates tell a
                message with tool calls by it.

        Raises:
            Unsupported: the model has no template. BadInput: a message that is malformed or that the
            template refuses. InvalidModelFile: the template itself does not compile.
        """
        if not self.source:
            raise Unsupported(
                "this model has no chat template, so it cannot chat",
                hint="It is probably a base model: use complete() or /v1/completions with a plain prompt.",
            )
        clean = [self._disarm(self._checked(m, i, keep_null)) for i, m in enumerate(messages)]
        if not clean:
            raise BadInput("messages is empty", hint='Give at least {"role": "user", "content": "…"}.')
        from jinja2 import TemplateError

        try:
            text = self._template.render(
                messages=clean,
                tools=[self._disarm(tool) for tool in tools] if tools else None,
                add_generation_prompt=True,
                bos_token=self.bos,
                eos_token=self.eos,
                **(variables or {}),
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise BadInput(f"the model's chat template refuses these messages: {error}") from error
        return [piece for piece in text.split(_BREAK) if piece]

    @cached_property
    def _template(self) -> jinja2.Template:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        try:
            return environment.from_string(self.source)
        except (
            TemplateSyntaxError,
            SyntaxError,
        ) as error:  # some only fail as the Python that Jinja makes of them
            raise InvalidModelFile(f"the model's chat template does not compile: {error}") from error

    def _checked(self, message: Message, index: int, keep_null: bool) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise BadInput(f"messages[{index}] is {type(message).__name__}", hint="It must be an object.")
        if message.get("role") not in ROLES:
            raise BadInput(
                f"messages[{index}].role is {message.get('role')!r}",
                hint=f"It must be one of {', '.join(ROLES)}.",
            )
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = "".join(self._text_part(part, index) for part in content)
        if content is not None and not isinstance(content, str):
            raise BadInput(f"messages[{index}].content is {type(content).__name__}", hint="It must be text.")
        role = message["role"]
        if role == "developer" and role not in self.source:
            role = "system"  # its name before; most templates know only that
        return {**message, "role": role, "content": content if keep_null else content or ""}

    @staticmethod
    def _text_part(part: Any, index: int) -> str:
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise Unsupported(
            f"messages[{index}].content has a part of type {kind!r}", hint="Only text parts work here."
        )

    def _disarm(self, value: Any) -> Any:
        """The same message, with every control token in its text cut by `_BREAK`."""
        if isinstance(value, str):
            value = value.replace(_BREAK, "")
            return self._control.sub(lambda m: m[0][0] + _BREAK + m[0][1:], value) if self._control else value
        if isinstance(value, Mapping):
            return {self._disarm(k): self._disarm(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._disarm(v) for v in value]
        return value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would change the prompt.
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return text.replace("\\ue0a1", _BREAK) if ensure_ascii else text


def _refuse(message: str) -> NoReturn:
    raise BadInput(f"the model's chat template refuses these messages: {message}")


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
