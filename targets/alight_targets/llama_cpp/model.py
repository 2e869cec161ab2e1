"""The Model contract on llama.cpp: one sequence at a time, re-using the prompt's common beginning."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from alight.artifact import Artifact
from alight.chat import ChatTemplate
from alight.errors import BadInput, ContextExceeded, EngineError
from alight.target import Chunk, FinishReason, LoadOptions, Model, ModelInfo, Sampling, Scores, Usage
from alight.text import TextStream
from alight_targets.llama_cpp.native import NativeContext, NativeModel
from alight_targets.llama_cpp.sampler import Sampler

if TYPE_CHECKING:
    from alight.target import FloatArray

BATCH = 512  # tokens per prefill step; also what the planner counts compute buffers for


class LlamaCppModel(Model):
    """A GGUF artifact on llama.cpp.

    Args:
        context, threads: as decided by the target: tokens and physical cores.
    """

    def __init__(
        self, artifact: Artifact, options: LoadOptions, *, context: int, threads: int, target: str
    ) -> None:
        self._native = NativeModel(artifact.weights, mmap=options.mmap)
        self._options = options
        self._threads = threads
        try:
            self._context = self._open_context(context, outputs=1)
        except EngineError:
            self._native.close()
            raise
        self._lock = threading.Lock()
        self._cached: list[int] = []  # the tokens whose keys and values the context holds
        native = self._native
        self.info = ModelInfo(
            name=artifact.name,
            architecture=artifact.description.architecture,
            context=self._context.context,
            vocabulary=native.vocabulary,
            parameters=native.parameters,
            target=target,
            trained_context=native.trained_context,
            details={"threads": threads, "kv_type": options.kv_type},
        )
        special = artifact.header().metadata
        self.template = ChatTemplate(
            native.chat_template(),
            bos=native.token_text(special.get("tokenizer.ggml.bos_token_id", -1)),
            eos=native.token_text(special.get("tokenizer.ggml.eos_token_id", -1)),
            control_tokens=native.control_tokens(),
        )

    def generate(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generator[Chunk]:
        sampling = sampling or Sampling()
        tokens = self.tokenize(prompt, bos=True) if isinstance(prompt, str) else self._checked(prompt)
        if not tokens:
            raise BadInput("the prompt is empty", hint="Give at least one token of text.")
        if len(tokens) >= self.info.context:
            raise ContextExceeded(len(tokens) + 1, self.info.context)
        return self._run(tokens, sampling)

    def _run(self, prompt: list[int], sampling: Sampling) -> Generator[Chunk]:
        room = self.info.context - len(prompt)
        limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        with self._lock, Sampler(sampling, self._native) as sampler:
            context = self._opened()
            started = time.perf_counter()
            if limit == 0:
                yield Chunk(finish_reason="length", usage=Usage(prompt_tokens=len(prompt)))
                return
            for _ in self._prefill(context, prompt):
                yield Chunk()
            sampler.accept(prompt)
            stream = TextStream(sampling.stop)
            made = 0
            reason: FinishReason = "length"
            first = 0.0
            while True:
                token = sampler.sample(context)
                first = first or time.perf_counter()
                made += 1
                if self._native.is_end(token):
                    reason = "stop"
                    break
                text = stream.feed(self._native.piece(token))
                if stream.stopped:
                    reason = "stop"
                    yield Chunk(text, (token,))
                    break
                yield Chunk(text, (token,))
                if made == limit:
                    break
                context.decode([token], len(self._cached))
                self._cached.append(token)
            ended = time.perf_counter()
            usage = Usage(len(prompt), made, first - started, ended - first)
            yield Chunk(stream.finish(), (), reason, usage)

    def _prefill(self, context: NativeContext, prompt: list[int]) -> Generator[None]:
        """Bring the context to hold exactly `prompt`, with logits for its last token. Yields after each batch."""
        keep = _common(self._cached, prompt)
        keep = min(keep, len(prompt) - 1)  # the last token must run again: its logits are wanted
        if keep < len(self._cached) and not context.forget_from(keep):
            context.clear()
            keep = 0
        del self._cached[keep:]
        for at in range(keep, len(prompt), context.batch):
            part = prompt[at : at + context.batch]
            context.decode(part, at)
            self._cached += part
            yield

    def score(self, tokens: Sequence[int], *, distribution: bool = False) -> Scores:
        ids = self._checked(tokens)
        if len(ids) < 2:
            raise BadInput(f"score got {len(ids)} tokens", hint="It needs at least two.")
        if len(ids) > self.info.context:
            raise ContextExceeded(len(ids), self.info.context)
        with self._lock:
            self._opened()
            context = self._open_context(len(ids), outputs=BATCH)
            try:
                logprobs = np.empty(len(ids) - 1, np.float32)
                rows = np.empty((len(ids) - 1, self.info.vocabulary), np.float32) if distribution else None
                for at in range(0, len(ids) - 1, context.batch):
                    part = ids[at : min(at + context.batch, len(ids) - 1)]
                    context.decode(part, at, outputs=True)
                    logp = _log_softmax(context.logits(len(part)))
                    logprobs[at : at + len(part)] = logp[
                        np.arange(len(part)), ids[at + 1 : at + 1 + len(part)]
                    ]
                    if rows is not None:
                        rows[at : at + len(part)] = logp
            finally:
                context.close()
        return Scores(tuple(ids), logprobs, rows)

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        self._opened()
        return self._native.tokenize(text, bos=bos and self._native.adds_bos, special=special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        self._opened()
        return self._native.detokenize(self._checked(tokens), special=special)

    def close(self) -> None:
        with self._lock:
            self._context.close()
            self._native.close()

    def _open_context(self, context: int, outputs: int) -> NativeContext:
        return NativeContext(
            self._native,
            context=context,
            batch=BATCH,
            outputs=outputs,
            threads=self._threads,
            kv_type=self._options.kv_type,
            flash_attention=self._options.flash_attention,
        )

    def _opened(self) -> NativeContext:
        if not self._native.pointer:
            raise EngineError(f"model {self.info.name!r} is closed", hint="Load it again.")
        return self._context

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = list(tokens)
        bad = next((t for t in ids if not 0 <= t < self.info.vocabulary), None)
        if bad is not None:
            raise BadInput(f"token {bad} is outside the vocabulary of {self.info.vocabulary}")
        return ids


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    size = min(len(a), len(b))
    return next((i for i in range(size) if a[i] != b[i]), size)


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted: FloatArray = logits - logits.max(axis=1, keepdims=True)
    logp: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logp
