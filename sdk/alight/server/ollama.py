"""The Ollama API: /api/version, tags, ps, show, chat, generate.

As in Ollama, `stream` is on unless it is false, and an error in the middle of a stream is a line of its own.
Unlike there, a prompt longer than the context is an error (nothing is cut off silently), an option that
would change the answer and is not supported is refused by name, and loaded models stay until `keep_alive: 0`.
What a request leaves out has alight's own defaults (`alight.Sampling`).
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, ConfigDict
from starlette.concurrency import run_in_threadpool

from alight import __version__
from alight.server.bodies import Body, check_extras, read, words
from alight.server.failures import Refused
from alight.server.models import Models
from alight.server.ollama_models import listed, running, shown, timestamp
from alight.server.stream import Answer, Answers, StreamedAnswer, to_json
from alight.target import Chunk, Model, Sampling, Usage

OLLAMA_VERSION = "0.33.0"  # whose API this is; clients compare it before they use newer parts

IGNORED = words("truncate shift")  # we never cut a prompt, so there is nothing to say about how
NOT_YET: dict[str, tuple[Any, ...]] = {
    "format": ("",),
    "think": (False,),
    "tools": ([],),
    "images": ([],),
    "suffix": ("",),
    "template": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
}
# How the model is loaded is the server's business: its context is there already, and one that is too small
# for a prompt says so.
IGNORED_OPTIONS = words(
    "num_ctx num_keep num_batch num_gpu main_gpu num_thread use_mmap use_mlock numa low_vram f16_kv "
    "vocab_only logits_all embedding_only penalize_newline mirostat_tau mirostat_eta"
)
OPTIONS_NOT_YET: dict[str, tuple[Any, ...]] = {"mirostat": (0,), "typical_p": (1,), "tfs_z": (1,)}

_DURATION = re.compile(r"[-+]?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h)?)+")  # as Go's; "0" and "300" are durations too


class Options(Body):
    # Not strict, unlike the rest: as in Ollama, 10.0 is an integer.
    model_config = ConfigDict(strict=False, extra="allow", allow_inf_nan=False)

    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[
        list[str] | None, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = None

    def sampling(self) -> Sampling:
        options = self.model_dump(exclude_none=True, include=_SAMPLING)
        if self.num_predict is not None and self.num_predict > 0:  # -1, -2 and 0 are "no limit"
            options["max_tokens"] = self.num_predict
        if self.top_k is not None:
            options["top_k"] = max(self.top_k, 0)
        if self.seed is not None:
            # -1 is "another one each time". Engines take 32 bits, and the last value as just that.
            options["seed"] = None if self.seed == -1 else self.seed % 0xFFFFFFFF
        return Sampling.of(**options)


_SAMPLING = set(Options.model_fields) & set(Sampling.__dataclass_fields__)


class GenerationRequest(Body):
    model: str
    stream: bool | None = None
    options: Options | None = None
    keep_alive: float | str | None = None

    def sampling(self) -> Sampling:
        return (self.options or Options()).sampling()

    def unloads(self) -> bool:
        """Whether the model is to be unloaded afterwards: a `keep_alive` of no time at all."""
        text = "" if self.keep_alive is None else str(self.keep_alive)
        if text and not _DURATION.fullmatch(text):
            raise Refused(
                400, f"keep_alive is {text!r}", hint="Use seconds, or a text like 5m.", param="keep_alive"
            )
        return bool(text) and not re.search(r"[1-9]", text)


class ChatRequest(GenerationRequest):
    messages: list[dict[str, Any]] | None = None


class GenerateRequest(GenerationRequest):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    context: list[int] | None = None  # what the answer before returned


class ShowRequest(Body):
    model: str | None = None
    name: str | None = None  # what `model` was called before
    verbose: bool | None = None


def router(models: Models, answers: Answers) -> APIRouter:
    api = APIRouter(prefix="/api")

    @api.api_route("/version", methods=["GET", "HEAD"])
    def version() -> dict[str, str]:
        return {"version": OLLAMA_VERSION, "alight": __version__}

    @api.api_route("/tags", methods=["GET", "HEAD"])
    def tags() -> dict[str, Any]:
        return {"models": [listed(offer) for offer in models.list()]}

    @api.get("/ps")
    def ps() -> dict[str, Any]:
        return {"models": [running(offer, offer.model) for offer in models.list() if offer.model]}

    @api.post("/show")
    async def show(request: Request) -> dict[str, Any]:
        body = await read(request, ShowRequest)
        check_extras(body, words("system template options"), {})
        name = body.model or body.name
        if not name:
            raise Refused(400, "`model` is required", param="model")
        return await run_in_threadpool(lambda: shown(models.find(name), verbose=bool(body.verbose)))

    @api.post("/chat")
    async def chat(request: Request) -> Response:
        body = await read(request, ChatRequest)
        sampling = _checked(body)
        messages = [_message(message, i) for i, message in enumerate(body.messages or [])]

        def begin(model: Model) -> Generator[Chunk]:
            return model.generate(model.chat_tokens(messages), sampling)

        def content(text: str) -> dict[str, Any]:
            return {"message": {"role": "assistant", "content": text}}

        if not messages:
            return await _load_or_unload(request, models, answers, body, content(""))
        answer = await answers.start(request, body.model, begin, unload=body.unloads())
        return await _respond(answer, body, content, lambda _: {})

    @api.post("/generate")
    async def generate(request: Request) -> Response:
        body = await read(request, GenerateRequest)
        sampling = _checked(body)
        if body.raw and (body.system or body.context):
            raise Refused(400, "raw mode takes no system text and no context", param="raw")
        prompt: list[int] = []  # the tokens of a prompt that is not raw

        def begin(model: Model) -> Generator[Chunk]:
            if body.raw:
                return model.generate(body.prompt or "", sampling)
            prompt.extend(_prompt_tokens(model, body))
            return model.generate(prompt, sampling)

        def content(text: str) -> dict[str, Any]:
            return {"response": text}

        def context(answer: Sequence[int]) -> dict[str, Any]:
            return {} if body.raw else {"context": [*prompt, *answer]}

        if not body.prompt:
            return await _load_or_unload(request, models, answers, body, content(""))
        answer = await answers.start(request, body.model, begin, unload=body.unloads())
        return await _respond(answer, body, content, context)

    return api


def _checked(body: GenerationRequest) -> Sampling:
    check_extras(body, IGNORED, NOT_YET)
    if body.options:
        check_extras(body.options, IGNORED_OPTIONS, OPTIONS_NOT_YET, "options.")
    return body.sampling()


def _message(message: dict[str, Any], index: int) -> dict[str, Any]:
    if message.get("images"):
        where = f"messages[{index}].images"
        raise Refused(400, f"`{where}` is not in this version yet", code="unsupported", param=where)
    return {key: value for key, value in message.items() if key not in ("images", "thinking")}


def _prompt_tokens(model: Model, body: GenerateRequest) -> list[int]:
    """The prompt through the chat template, after the conversation in `context`."""
    messages = [{"role": "user", "content": body.prompt}]
    if body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    if model.template.source or body.system:
        tokens = model.chat_tokens(messages)
    else:  # a base model: as in Ollama, the prompt is then all there is
        tokens = model.tokenize(body.prompt or "", bos=True)
    if not body.context:
        return tokens
    beginning = model.tokenize("", bos=True)  # has its place at the very beginning only
    if beginning and tokens[: len(beginning)] == beginning:
        tokens = tokens[len(beginning) :]
    return body.context + tokens


async def _load_or_unload(
    request: Request, models: Models, answers: Answers, body: GenerationRequest, content: dict[str, Any]
) -> Response:
    """An empty prompt: nothing is generated, the model is made ready, or let go."""
    if body.unloads():
        await run_in_threadpool(models.unload, body.model)
        reason = "unload"
    else:
        with await answers.start(request, body.model, _no_chunks):
            reason = "load"
    return JSONResponse(_line(body, content, done=True) | {"done_reason": reason})


def _no_chunks(model: Model) -> Generator[Chunk]:  # noqa: ARG001
    yield from ()


async def _respond(
    answer: Answer,
    body: GenerationRequest,
    content: Callable[[str], dict[str, Any]],
    extra: Callable[[Sequence[int]], dict[str, Any]],
) -> Response:
    """Answer in lines or in one piece.

    Args:
        content: the part of a line that holds a text.
        extra: what the last line adds, from the tokens of the answer.
    """
    if body.stream is not False:
        lines = _lines(answer, body, content, extra)
        return StreamedAnswer(
            answer, lines, lambda failure: _ndjson(failure.ollama()), "application/x-ndjson"
        )
    with answer:
        whole = await answer.collect()
    end = extra(whole.tokens) | _ending(answer, whole.finish_reason, whole.usage)
    return JSONResponse(_line(body, content(whole.text), done=True) | end)


async def _lines(
    answer: Answer,
    body: GenerationRequest,
    content: Callable[[str], dict[str, Any]],
    extra: Callable[[Sequence[int]], dict[str, Any]],
) -> AsyncIterator[bytes]:
    tokens: list[int] = []
    last = Chunk()
    async for last in answer:
        tokens += last.tokens
        if last.text:
            yield _ndjson(_line(body, content(last.text), done=False))
    end = extra(tokens) | _ending(answer, last.finish_reason or "stop", last.usage or Usage())
    yield _ndjson(_line(body, content(""), done=True) | end)


def _line(body: GenerationRequest, content: dict[str, Any], *, done: bool) -> dict[str, Any]:
    return {"model": body.model, "created_at": timestamp(time.time()), **content, "done": done}


def _ending(answer: Answer, reason: str, usage: Usage) -> dict[str, Any]:
    """Why an answer ended, and what it took; durations are nanoseconds."""
    return {
        "done_reason": reason,
        "total_duration": _nanoseconds(time.monotonic() - answer.started),
        "load_duration": _nanoseconds(answer.load_seconds),
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": _nanoseconds(usage.prompt_seconds),
        "eval_count": usage.completion_tokens,
        "eval_duration": _nanoseconds(usage.decode_seconds),
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _ndjson(data: dict[str, Any]) -> bytes:
    return to_json(data) + b"\n"
