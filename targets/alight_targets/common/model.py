"""The Model contract over a Backend: requests go to the scheduler, which pushes their chunks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from alight.errors import BadInput, ContextExceeded, EngineError, Unsupported
from alight.pushed import Cancel, Deliver, PushedChunks
from alight.target import (
    Chunk,
    LoadOptions,
    Model,
    ModelInfo,
    Prompt,
    Sampling,
    Scores,
    Usage,
    without_images,
)
from alight.text import TextStream
from alight_targets.common.backend import Backend
from alight_targets.common.guidance import Guides
from alight_targets.common.request import Request
from alight_targets.common.sampler import Sampler, likeliest
from alight_targets.common.scheduler import Scheduler
from alight_targets.common.tokenizer import Tokenizer

if TYPE_CHECKING:
    from alight.target import FloatArray


class BatchedModel(Model):
    """A model whose engine is a Backend.

    Args:
        open_backend: makes the backend; called on the thread that uses it.
        info: what is known of the model; context, vocabulary and details are completed from the backend.
        extra: of alight that brings what the target needs, for the message where something is missing.

    Raises:
        Unsupported: an option that needs more than a Backend. And what `open_backend` raises.
    """

    def __init__(
        self,
        open_backend: Callable[[], Backend],
        tokenizer: Tokenizer,
        info: ModelInfo,
        options: LoadOptions,
        *,
        extra: str,
    ) -> None:
        _refuse_unsupported(options, info.target)
        self._tokenizer = tokenizer
        self._guides = Guides(tokenizer, extra)
        self._shift = options.shift
        self._adapters = [name for name, _ in options.adapters]
        self.template = tokenizer.template
        self._scheduler = Scheduler(open_backend, tokenizer, slots=options.slots)
        backend = self._scheduler.backend
        self.info = replace(
            info,
            context=backend.context,
            vocabulary=backend.vocabulary,
            details={**info.details, "slots": options.slots, **backend.details},
        )
        self._closed = False

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk]:
        self._check_open()
        sampling = sampling or Sampling()
        if isinstance(prompt, str):
            tokens = self.tokenize(prompt, bos=True)
        else:
            tokens = self._checked(without_images(prompt, self.info.name))
        if not tokens:
            raise BadInput("the prompt is empty", hint="Give at least one token of text.")
        if len(tokens) >= self.info.context:
            raise ContextExceeded(len(tokens) + 1, self.info.context)
        request = self._request(tokens, sampling)
        if request.limit == 0:
            return (c for c in [Chunk(finish_reason="length", usage=Usage(prompt_tokens=len(tokens)))])
        return PushedChunks(lambda deliver: self._begin(request, deliver))

    def _request(self, tokens: list[int], sampling: Sampling) -> Request:
        for name, _ in sampling.adapters:
            if name not in self._adapters:
                known = ", ".join(sorted(self._adapters)) or "none"
                raise BadInput(f"no adapter {name!r} is loaded", hint=f"Loaded: {known}.")
        room = self.info.context - len(tokens)
        wanted = room if sampling.max_tokens is None else sampling.max_tokens
        shown = {t for text in sampling.keep_special for t in self._tokenizer.tokenize(text, special=True)}
        guide = self._guides.guide(sampling)
        return Request(
            tokens,
            sampling,
            Sampler(sampling, self._tokenizer, self.info.vocabulary, guide),
            TextStream(sampling.stop),
            limit=wanted if self._shift else min(wanted, room),
            shift=self._shift,
            shown_special=frozenset(shown),
        )

    def _begin(self, request: Request, deliver: Deliver) -> Cancel:
        request.deliver = deliver
        self._scheduler.submit(request)

        def cancel() -> None:
            request.cancelled = True  # seen by the scheduler before its next step

        return cancel

    def score(self, tokens: Sequence[int], *, distribution: bool = False, top: int = 0) -> Scores:
        self._check_open()
        ids = self._checked(tokens)
        if len(ids) < 2:
            raise BadInput(f"score got {len(ids)} tokens", hint="It needs at least two.")
        if len(ids) > self.info.context:
            raise ContextExceeded(len(ids), self.info.context)
        return self._scheduler.call(lambda: self._score(ids, distribution, top))

    def _score(self, ids: list[int], distribution: bool, top: int) -> Scores:
        following = np.array(ids[1:])
        logprobs = np.empty(len(following), np.float32)
        rows = np.empty((len(following), self.info.vocabulary), np.float32) if distribution else None
        best: list[tuple[tuple[int, float], ...]] = []
        at = 0
        for block in self._scheduler.logits(ids[:-1]):
            logp = _log_softmax(block)
            part = slice(at, at + len(logp))
            logprobs[part] = logp[np.arange(len(logp)), following[part]]
            if rows is not None:
                rows[part] = logp
            if top:
                best += [tuple((int(t), float(row[t])) for t in likeliest(row, top)) for row in logp]
            at += len(logp)
        return Scores(tuple(ids), logprobs, rows, tuple(best))

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        self._check_open()
        return self._tokenizer.tokenize(text, bos=bos, special=special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        self._check_open()
        return self._tokenizer.detokenize(self._checked(tokens), special=special)

    def metrics(self) -> dict[str, float]:
        return self._scheduler.gauges()

    def progress(self) -> int:
        return self._scheduler.work

    @property
    def alive(self) -> bool:
        return self._scheduler.alive

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._scheduler.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"model {self.info.name!r} is closed", hint="Load it again.")

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = list(tokens)
        bad = next((t for t in ids if not 0 <= t < self.info.vocabulary), None)
        if bad is not None:
            raise BadInput(f"token {bad} is outside the vocabulary of {self.info.vocabulary}")
        return ids


def _refuse_unsupported(options: LoadOptions, target: str) -> None:
    """What of the options a Backend has no counterpart of. (`mmap` is a wish that costs nothing to leave out.)"""
    asked = {
        "lookup": options.lookup > 0,
        "draft": options.draft is not None,
        "projector": options.projector is not None,
        "prompt_cache": options.prompt_cache is not None,
        "kv_type": options.kv_type != LoadOptions().kv_type,
        "flash_attention": options.flash_attention is not None,
    }
    if name := next((name for name, is_asked in asked.items() if is_asked), ""):
        raise Unsupported(
            f"target {target!r} has no {name}", hint=f"Leave {name} out, or use a GGUF on the cpu target."
        )


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted: FloatArray = logits - logits.max(axis=1, keepdims=True)
    logp: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logp
