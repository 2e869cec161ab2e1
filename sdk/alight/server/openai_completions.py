"""/v1/completions: prompts to be continued, or filled in."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from alight.server.bodies import read
from alight.server.failures import Refused
from alight.server.manager import Models
from alight.server.ollama_insert import insert_tokens
from alight.server.openai_bodies import CompletionRequest, blaming
from alight.server.openai_brought import Brought
from alight.server.openai_parts import TextLogprobs, event, usage_of
from alight.server.several import Several
from alight.server.stream import Answers, Begin, StreamedAnswer
from alight.target import Chunk, Model, Sampling, TokenLogprob, Usage
from alight.tools.schema import parse_schema

MAX_ANSWERS = 128  # to one request: prompts times `n`


def router(models: Models, answers: Answers) -> APIRouter:
    api = APIRouter()

    @api.post("/completions")
    async def complete(request: Request) -> Response:
        body = await read(request, CompletionRequest)
        body.check()
        call = _Call(body, models)
        texts = [_Text(i, body.logprobs is not None) for i in range(len(call.prompts) * body.choices)]
        several = await Several.start(answers, request, body.model, [call.begin(t.index) for t in texts])
        head = _Head(body.model)
        if body.stream:
            lines = _events(several, texts, head, body)
            return StreamedAnswer(
                several, lines, lambda failure: event(failure.openai()), "text/event-stream"
            )
        with several:
            async for index, chunk in several:
                texts[index].read(chunk)
        whole = head.of([text.piece() for text in texts])
        return JSONResponse(whole | {"usage": _usage(texts, body.choices)})

    return api


class _Call:
    """A request, checked as far as is possible without the model."""

    def __init__(self, body: CompletionRequest, models: Models) -> None:
        self.body = body
        self.models = models
        self.prompts = body.prompts()
        body.completion_sampling(Sampling())  # raises
        if body.json_schema:
            with blaming("json_schema"):
                parse_schema(body.json_schema, "json_schema")
        if not 1 <= len(self.prompts) * body.choices <= MAX_ANSWERS:
            what = f"{len(self.prompts)} prompts with n={body.choices}"
            raise Refused(400, what, hint=f"Ask for 1 to {MAX_ANSWERS} answers.", param="prompt")

    def begin(self, index: int) -> Begin:
        """What generates the answer of that number. Those of one request differ by their seed."""

        def begin(model: Model) -> Generator[Chunk]:
            body = self.body
            body.check_tokens(model)
            brought = Brought.of(self.models, body.model)
            sampling = body.completion_sampling(brought.sampling)
            if sampling.seed is not None:
                sampling = replace(sampling, seed=sampling.seed + index)
            prompt = self.prompts[index // body.choices]
            chunks = model.generate(self._with_suffix(model, brought, prompt), sampling)
            return _after_echo(model, prompt, sampling, chunks) if body.echo else chunks

        return begin

    def _with_suffix(self, model: Model, brought: Brought, prompt: str | list[int]) -> str | list[int]:
        if not self.body.suffix:
            return prompt
        if not isinstance(prompt, str):
            raise Refused(400, "with a `suffix`, `prompt` must be text", param="prompt")
        offer = self.models.find(self.body.model)
        return insert_tokens(model, offer, brought.preset.written, prompt, self.body.suffix)


def _after_echo(
    model: Model, prompt: str | list[int], sampling: Sampling, chunks: Generator[Chunk]
) -> Generator[Chunk]:
    """The prompt, with the log-probabilities of its tokens where those are wanted, and then the answer."""
    text = prompt if isinstance(prompt, str) else model.detokenize(prompt).decode(errors="replace")
    try:
        scored = () if sampling.logprobs is None else _scored(model, prompt, sampling.logprobs)
        yield Chunk(text, logprobs=scored)
        yield from chunks
    finally:
        chunks.close()


def _scored(model: Model, prompt: str | list[int], top: int) -> tuple[TokenLogprob, ...]:
    """The log-probabilities of a prompt's own tokens. The beginning-of-text token is not part of it."""
    tokens = model.tokenize(prompt, bos=True) if isinstance(prompt, str) else prompt
    pieces = [model.detokenize([token]) for token in tokens]
    first = len(model.tokenize("", bos=True)) if isinstance(prompt, str) else 0
    if len(tokens) < 2:
        return tuple(TokenLogprob(t, p, math.nan) for t, p in zip(tokens, pieces, strict=True))[first:]
    scores = model.score(tokens, top=top)
    found = [TokenLogprob(tokens[0], pieces[0], math.nan)]
    for i, logprob in enumerate(scores.logprobs):
        likeliest = scores.top[i] if top else ()
        best = tuple((token, model.detokenize([token]), value) for token, value in likeliest)
        found.append(TokenLogprob(tokens[i + 1], pieces[i + 1], float(logprob), best))
    return tuple(found[first:])


@dataclass(slots=True)
class _Text:
    """One of the answers, as it comes."""

    index: int
    wants_logprobs: bool
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    logprobs: TextLogprobs = field(default_factory=TextLogprobs)
    reason: str | None = None
    usage: Usage = field(default_factory=Usage)

    def read(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.tokens += chunk.logprobs
        if chunk.finish_reason:
            self.reason = chunk.finish_reason
            self.usage = chunk.usage or Usage()

    def piece(self) -> dict[str, Any]:
        """What has come since the last call."""
        text, tokens, self.text, self.tokens = self.text, self.tokens, "", []
        logprobs = self.logprobs.of(tokens) if self.wants_logprobs else None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.reason}


class _Head:
    """What all parts of an answer begin with."""

    def __init__(self, model: str) -> None:
        self._id = "cmpl-" + secrets.token_hex(12)
        self._created = int(time.time())
        self._model = model

    def of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "created": self._created,
            "model": self._model,
            "object": "text_completion",
            "choices": choices,
        }


async def _events(
    several: Several, texts: list[_Text], head: _Head, body: CompletionRequest
) -> AsyncIterator[bytes]:
    """Server-sent events: the pieces, the usage where it is wanted, and [DONE]."""
    no_usage = {"usage": None} if body.include_usage else {}
    async for index, chunk in several:
        text = texts[index]
        text.read(chunk)
        if text.text or text.reason:
            yield event(head.of([text.piece()]) | no_usage)
    if body.include_usage:
        yield event(head.of([]) | {"usage": _usage(texts, body.choices)})
    yield b"data: [DONE]\n\n"


def _usage(texts: list[_Text], choices: int) -> dict[str, Any]:
    """Each prompt counts once, for all the answers to it."""
    usages = []
    for at in range(0, len(texts), choices):
        made = sum(text.usage.completion_tokens for text in texts[at : at + choices])
        usages.append(replace(texts[at].usage, completion_tokens=made))
    return usage_of(usages)
