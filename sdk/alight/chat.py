"""Conversations to prompts: a model's own chat template, rendered in a sandbox.

The template (Jinja, as Hugging Face and GGUF files carry it) is code from outside, so it runs in
Jinja's immutable sandbox. Text from users must not forge control tokens: see `ChatTemplate.render`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from alight.errors import BadInput, InvalidModelFile, Unsupported

if TYPE_CHECKING:
    import jinja2

Message: TypeAlias = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

# Private-use characters: one marks the inside of a control token's text in a message; another stands around
# the number of an image.
_BREAK, _IMAGE = "\ue0a1", "\ue0a2"
_MARKS = re.compile(f"[{_BREAK}{_IMAGE}]")


class ChatTemplate:
    """The chat template of one model.

    Args:
        source: the Jinja text; empty where the model has none (then `render` is an error).
        bos, eos: the texts of the beginning and end tokens, which templates name.
        control_tokens: the texts of all control tokens, such as "<|im_start|>".
        vision: the model sees, so that messages may hold images.
    """

    def __init__(
        self,
        source: str,
        *,
        bos: str = "",
        eos: str = "",
        control_tokens: Iterable[str] = (),
        vision: bool = False,
    ) -> None:
        self.source = source
        self.bos = bos
        self.eos = eos
        self.control_tokens = tuple(control_tokens)
        self.vision = vision
        texts = sorted({t for t in self.control_tokens if len(t) > 1}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, texts))) if texts else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        keep_null: bool = False,
    ) -> list[str | bytes]:
        """The prompt that asks for the assistant's next message.

        Returns it in pieces, to be tokenized one by one with control tokens recognised. Usually there is
        one piece. Where a message or tool holds the text of a control token, the prompt is cut inside that
        text, so that it cannot become the token: a user who types "<|im_end|>" stays a user. An image is a
        piece of its own: the bytes of its file.

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
        images: list[bytes] = []
        checked = [
            self._checked(_each_text(m, _unmarked), i, keep_null, images) for i, m in enumerate(messages)
        ]
        clean = [_each_text(message, self._disarm) for message in checked]
        if not clean:
            raise BadInput("messages is empty", hint='Give at least {"role": "user", "content": "…"}.')
        from jinja2 import TemplateError

        try:
            text = self._template.render(
                messages=clean,
                tools=[_each_text(t, lambda text: self._disarm(_unmarked(text))) for t in tools]
                if tools
                else None,
                add_generation_prompt=True,
                bos_token=self.bos,
                eos_token=self.eos,
                **(variables or {}),
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise BadInput(f"the model's chat template refuses these messages: {error}") from error
        return _pieces(text, images)

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

    def _checked(self, message: Message, index: int, keep_null: bool, images: list[bytes]) -> dict[str, Any]:
        """A message as templates take it; its images are added to `images`."""
        if not isinstance(message, Mapping):
            raise BadInput(f"messages[{index}] is {type(message).__name__}", hint="It must be an object.")
        if message.get("role") not in ROLES:
            raise BadInput(
                f"messages[{index}].role is {message.get('role')!r}",
                hint=f"It must be one of {', '.join(ROLES)}.",
            )
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = "".join(self._part(part, index, images) for part in content)
        if content is not None and not isinstance(content, str):
            raise BadInput(f"messages[{index}].content is {type(content).__name__}", hint="It must be text.")
        role = message["role"]
        if role == "developer" and role not in self.source:
            role = "system"  # its name before; most templates know only that
        return {**message, "role": role, "content": content if keep_null else content or ""}

    def _part(self, part: Any, index: int, images: list[bytes]) -> str:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if kind == "image" and isinstance(part.get("data"), bytes):
            if not self.vision:
                raise Unsupported(
                    f"messages[{index}] has an image, and this model cannot see images",
                    hint="Send text only, or take another model.",
                )
            images.append(part["data"])
            return f"{_IMAGE}{len(images) - 1}{_IMAGE}"
        known = '"text" and "image" (with its bytes as "data")' if self.vision else '"text"'
        raise Unsupported(
            f"messages[{index}].content has a part of type {kind!r}", hint=f"Parts can be {known} here."
        )

    def _disarm(self, text: str) -> str:
        """The same text, with every control token in it cut by `_BREAK`."""
        return self._control.sub(lambda m: m[0][0] + _BREAK + m[0][1:], text) if self._control else text


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The same message or tool, with all its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_each_text(k, change): _each_text(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(v, change) for v in value]
    return value


def _unmarked(text: str) -> str:
    """A text from outside, without the characters that mean something to us."""
    return _MARKS.sub("", text)


def _pieces(text: str, images: Sequence[bytes]) -> list[str | bytes]:
    """A rendered prompt, cut at its breaks and images."""
    pieces: list[str | bytes] = []
    seen = set()
    for i, between in enumerate(text.split(_IMAGE)):
        if i % 2:  # the number of an image
            pieces.append(images[int(between)])
            seen.add(int(between))
        else:
            pieces += [piece for piece in between.split(_BREAK) if piece]
    if len(seen) < len(images):
        raise BadInput("the model's chat template drops an image", hint="Give images in user messages.")
    return pieces


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
