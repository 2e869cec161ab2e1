"""The bodies of OpenAI's requests, and what they mean for us.

What a request leaves out has alight's own defaults (`alight.Sampling`: temperature 0.8, top_k 40, …, no
limit on the tokens but the context), the same as in Python and at /api; OpenAI's (temperature 1, top_p 1,
16 tokens for completions) suit large models. A field that would change the answer and is not supported is
refused by name; one that is not known at all, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from alight.errors import BadInput
from alight.server.bodies import Body, check_extras, words
from alight.server.failures import Refused
from alight.target import Model, Sampling
from alight.tools import check_schema

MAX_CHOICES = 8  # `n`: answers to one prompt

IGNORED = words(
    "user metadata store service_tier prediction prompt_cache_key prompt_cache_retention safety_identifier "
    "verbosity"
)
NOT_YET: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}

Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(max_length=16),
]


def _pairs(bias: Any) -> Any:
    """{"50256": -100} as OpenAI has it, or pairs, which our own client sends."""
    if isinstance(bias, Mapping):
        return [(int(token) if token.isdecimal() else token, value) for token, value in bias.items()]
    return (
        [tuple(pair) if isinstance(pair, list) else pair for pair in bias] if isinstance(bias, list) else bias
    )


LogitBias = Annotated[list[tuple[int, float]], BeforeValidator(_pairs)]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # ignored: padding against traffic analysis

    def check(self, where: str = "stream_options.") -> None:
        check_extras(self, frozenset(), {}, where)


class SamplingBody(Body):
    """The options of sampling. Those of Sampling's that OpenAI does not have are extensions."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: tuple[str, ...] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    logit_bias: LogitBias | None = None
    seed: int | None = None
    stop: Stop | None = None
    ignore_eos: bool | None = None
    adapters: tuple[tuple[str, float], ...] | None = None

    def sampling(self, base: Sampling, **more: Any) -> Sampling:
        """The Sampling of the body's own fields and of `more`; what is None is as in `base`."""
        options = {
            name: value
            for name in _SAMPLING
            if name in type(self).model_fields and (value := getattr(self, name)) is not None
        }
        if self.top_k is not None:
            options["top_k"] = max(self.top_k, 0)  # elsewhere -1 is off, too
        if self.seed is not None:
            options["seed"] = self.seed % 0xFFFFFFFF  # engines take 32 bits, and the last value as "random"
        if self.logit_bias is not None:
            options["logit_bias"] = tuple(self.logit_bias)
        if self.stop is not None:
            options["stop"] = tuple(self.stop)
        return replace(base, **options, **{name: value for name, value in more.items() if value is not None})

    def check_tokens(self, model: Model) -> None:
        """Raises Refused for a `logit_bias` of tokens that the model does not have."""
        for token, _ in self.logit_bias or ():
            if not 0 <= token < model.info.vocabulary:
                what = f"logit_bias has token {token}, outside the vocabulary of {model.info.vocabulary}"
                raise Refused(400, what, param="logit_bias")


_SAMPLING = set(Sampling.__dataclass_fields__) - {"max_tokens", "logprobs", "grammar", "json_schema"}


class GenerationRequest(SamplingBody):
    """What chat and completions share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raises Refused for fields that we do not know."""
        check_extras(self, IGNORED, NOT_YET)
        if self.stream_options:
            self.stream_options.check()


class ChatRequest(GenerationRequest):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    reasoning_effort: str | None = None
    grammar: str | None = None  # GBNF; an extension

    def chat_sampling(self, base: Sampling) -> Sampling:
        if self.top_logprobs and not self.logprobs:
            hint = "Send `logprobs`: true with it."
            raise Refused(400, "`top_logprobs` is for answers with logprobs", hint=hint, param="top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(base, max_tokens=limit, logprobs=logprobs, grammar=self.grammar)


class CompletionRequest(GenerationRequest):
    prompt: Any
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    grammar: str | None = None
    json_schema: str | None = None
    keep_special: tuple[str, ...] | None = None

    def completion_sampling(self, base: Sampling) -> Sampling:
        if self.best_of is not None and self.best_of != self.choices:
            hint = "Leave it out: we do not generate answers that nobody sees."
            raise Refused(
                400,
                f"`best_of` is {self.best_of} and not `n`",
                hint=hint,
                code="unsupported",
                param="best_of",
            )
        return self.sampling(
            base,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            grammar=self.grammar,
            json_schema=self.json_schema,
        )

    def prompts(self) -> list[str | list[int]]:
        """Each prompt as text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or _are_tokens(prompt):
            return [prompt]
        if isinstance(prompt, list) and all(isinstance(one, str) or _are_tokens(one) for one in prompt):
            return prompt
        what = "`prompt` must be text, a list of token ids, or a list of those"
        raise Refused(400, what, param="prompt")


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def schema_of(form: Mapping[str, Any] | None, where: str) -> str:
    """The JSON Schema, as text, that a `response_format` (or the `text.format` of a response) asks for; empty
    for text.

    Args:
        where: the name of the field.

    Raises:
        Refused: 400, naming the place.
    """
    param = where.partition(".")[0]
    kind = "text" if form is None else form.get("type")
    if form is None or kind == "text":
        return ""
    if kind == "json_object" and "schema" not in form:
        return "{}"
    if kind not in ("json_schema", "json_object"):
        hint = "It must be text, json_object or json_schema."
        raise Refused(400, f"{where}.type is {kind!r}", hint=hint, param=param)
    # The chat API wraps the schema once more.
    place = where if "schema" in form else f"{where}.json_schema"
    holder = form if "schema" in form else form.get("json_schema")
    if not isinstance(holder, Mapping) or "schema" not in holder:
        hint = 'It must be {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}.'
        raise Refused(400, f"{place} has no schema", hint=hint, param=param)
    with blaming(param):
        check_schema(holder["schema"], f"{place}.schema")
    return json.dumps(holder["schema"])


def thinks(effort: str | None, where: str) -> bool | None:
    """What a `reasoning_effort` means to a model that can reason: whether it does. None: it decides."""
    if effort is None:
        return None
    if effort in ("none", "minimal"):
        return False
    if effort in ("low", "medium", "high", "xhigh", "max"):
        return True
    raise Refused(400, f"`{where}` is {effort!r}", hint="It must be none, low, medium or high.", param=where)


@contextmanager
def blaming(param: str) -> Iterator[None]:
    """Errors of what a field holds, as refusals that name the field."""
    try:
        yield
    except BadInput as error:
        raise Refused(400, error.message, hint=error.hint, param=param) from None
