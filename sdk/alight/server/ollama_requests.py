"""What Ollama's clients may ask: request bodies, and options as sampling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, ValidationError

from alight.server import keep_alive
from alight.server.bodies import Body, check_extras, words
from alight.server.failures import Refused
from alight.server.images import image_part, read_base64
from alight.server.ollama_template import is_jinja
from alight.target import Sampling
from alight.tools import check_schema

# We never cut a prompt, so there is nothing to say about how; and what is no stream cannot be one.
IGNORED = words("truncate shift stream")
NOT_YET: dict[str, tuple[Any, ...]] = {"width": (), "height": (), "steps": ()}  # of images to be drawn
# How the model is loaded is the server's business.
IGNORED_OPTIONS = words(
    "num_keep num_batch num_gpu main_gpu num_thread use_mmap use_mlock numa low_vram f16_kv "
    "vocab_only logits_all embedding_only penalize_newline draft_num_predict"
)
OPTIONS_NOT_YET: dict[str, tuple[Any, ...]] = {"tfs_z": (1,)}  # llama.cpp has dropped it

THINK_LEVELS = ("high", "medium", "low", "max")


class Options(Body):
    """Sampling options: Ollama's, and those that only alight has (dry_*, xtc_*)."""

    # Not strict, unlike the rest: as in Ollama, 10.0 is an integer.
    model_config = ConfigDict(strict=False, extra="allow", allow_inf_nan=False)

    num_ctx: int | None = None
    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    seed: int | None = None
    stop: Annotated[
        list[str] | None, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = None

    def check(self) -> None:
        check_extras(self, IGNORED_OPTIONS, OPTIONS_NOT_YET, "options.")

    def over(self, parameters: Mapping[str, Any]) -> Options:
        """These options, and a model's own parameters where these say nothing."""
        asked = {**self.model_dump(exclude_none=True)}
        return Options.model_validate({**parameters, **asked})

    def context(self) -> int | None:
        """The tokens that the model is to hold. As in Ollama, one that holds fewer is loaded anew."""
        return self.num_ctx if self.num_ctx and self.num_ctx > 0 else None

    def sampling(self, **more: Any) -> Sampling:
        options = self.model_dump(exclude_none=True, include=_SAMPLING)
        if self.num_predict is not None and self.num_predict > 0:  # -1, -2 and 0 are "no limit"
            options["max_tokens"] = self.num_predict
        if self.top_k is not None:
            options["top_k"] = max(self.top_k, 0)
        if self.seed is not None:
            # -1 is "another one each time". Engines take 32 bits, and the last value as just that.
            options["seed"] = None if self.seed == -1 else self.seed % 0xFFFFFFFF
        return Sampling.of(**options, **more)


_SAMPLING = set(Options.model_fields) & set(Sampling.__dataclass_fields__)


def parameters_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a model that is created, checked; null ones are left out.

    Raises:
        Refused: 400 that names the parameter.
    """
    wanted = {key: value for key, value in given.items() if value is not None}
    try:
        options = Options.model_validate(wanted)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise Refused(400, f"parameters.{name}: {first['msg']}", param=f"parameters.{name}") from None
    check_extras(options, IGNORED_OPTIONS, OPTIONS_NOT_YET, "parameters.")
    options.sampling()  # raises BadInput for a value out of range
    return wanted


class ModelRequest(Body):
    """What all requests to a model share."""

    model: str
    options: Options | None = None
    keep_alive: float | str | None = None

    def check(self) -> None:
        """Raises Refused for what we do not know."""
        check_extras(self, IGNORED, NOT_YET)
        if self.options:
            self.options.check()

    def kept(self) -> float | None:
        """Seconds to keep the model; None leaves it to the server."""
        return keep_alive.parse(self.keep_alive)


class GenerationRequest(ModelRequest):
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def check(self) -> None:
        super().check()
        if not 0 <= (self.top_logprobs or 0) <= 20:
            raise Refused(400, "top_logprobs must be between 0 and 20", param="top_logprobs")
        if isinstance(self.think, str) and self.think not in THINK_LEVELS:
            known = ", ".join(f'"{level}"' for level in THINK_LEVELS)
            raise Refused(
                400, f'invalid think value: "{self.think}" (must be {known}, true, or false)', param="think"
            )
        self.json_schema()

    def json_schema(self) -> str:
        """`format` as Sampling has it: the JSON text of a schema, or an empty one."""
        if not self.format:
            return "{}" if isinstance(self.format, dict) else ""
        if self.format == "json":
            return "{}"
        if isinstance(self.format, str):
            message = f'invalid format: "{self.format}"; expected "json" or a valid JSON Schema object'
            raise Refused(400, message, param="format")
        check_schema(self.format, "format")
        return json.dumps(self.format)

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatRequest(GenerationRequest):
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(GenerationRequest):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    raw: bool | None = None
    context: list[int] | None = None  # what the answer before returned
    images: list[str] | None = None

    def check(self) -> None:
        super().check()
        if self.raw and (self.system or self.template or self.context):
            raise Refused(400, "raw mode does not support template, system, or context", param="raw")
        if self.images and self.suffix:
            raise Refused(400, "`suffix` is not for prompts with images", param="suffix")
        if self.template and is_jinja(self.template):
            # A Jinja template can loop for ever. That of a model is its maker's business; this is any client.
            hint = "Make a model with this template (/api/create), or write it in Ollama's language."
            raise Refused(400, "`template` is in Jinja", hint=hint, code="unsupported", param="template")


class EmbedRequest(ModelRequest):
    input: Any = None
    truncate: bool | None = None
    dimensions: int | None = None

    def texts(self) -> list[str]:
        """The texts to embed. Raises Refused where they are of another type."""
        if self.input is None or self.input == "":
            return []
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refused(
                400, "invalid input type", hint="It must be a text or a list of texts.", param="input"
            )
        return texts


class EmbeddingsRequest(ModelRequest):
    prompt: str | None = None


def seen(images: Any, text: Any, where: str) -> list[dict[str, Any]]:
    """The content of a message: its images, and then its text.

    Raises:
        Refused: 400, naming the image.
    """
    if not isinstance(images, list):
        raise Refused(400, f"`{where}` is {type(images).__name__}", hint="It must be a list.", param="images")
    parts = [image_part(read_base64(image, f"{where}[{i}]")) for i, image in enumerate(images)]
    return [*parts, {"type": "text", "text": text or ""}]


def as_openai(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message of Ollama's as `prepare_chat` takes it: roles, tool calls and reasoning by OpenAI's names."""
    told = {key: value for key, value in message.items() if key not in ("images", "thinking", "tool_name")}
    if images := message.get("images"):
        told["content"] = seen(images, message.get("content"), f"messages[{index}].images")
    if isinstance(told.get("role"), str):
        told["role"] = told["role"].lower()
    if thinking := message.get("thinking"):
        told["reasoning_content"] = thinking
    if tool_name := message.get("tool_name"):
        told["name"] = tool_name
    if calls := message.get("tool_calls"):
        told["tool_calls"] = [
            {"id": f"call_{number}", "type": "function", **call} if isinstance(call, dict) else call
            for number, call in enumerate(calls)
        ]
    return told
