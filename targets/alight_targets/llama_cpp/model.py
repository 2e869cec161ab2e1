"""The Model contract on llama.cpp: requests go to the scheduler, which pushes their chunks."""

from __future__ import annotations

import platform
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alight.artifact import Artifact
from alight.chat import ChatTemplate
from alight.errors import BadInput, ContextExceeded, EngineError
from alight.planner import BATCH
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
from alight_targets.llama_cpp.cache import Cache
from alight_targets.llama_cpp.embed import embed
from alight_targets.llama_cpp.layout import PAGE, Layouts
from alight_targets.llama_cpp.native import NativeContext, NativeModel
from alight_targets.llama_cpp.prompt_cache import PromptCache
from alight_targets.llama_cpp.request import Adapters, Request
from alight_targets.llama_cpp.sampler import Sampler
from alight_targets.llama_cpp.scheduler import Drafter, Scheduler
from alight_targets.llama_cpp.speculative import DRAFT, DraftModel, PromptLookup

if TYPE_CHECKING:
    from alight.target import FloatArray
    from alight_targets.llama_cpp.vision import Image, Vision

KEPT = 16  # finished conversations that stay in the KV cache
_X86 = ("x86_64", "AMD64")


class LlamaCppModel(Model):
    """A GGUF artifact on llama.cpp.

    Args:
        context, threads: as decided by the target: tokens and physical cores.
    """

    def __init__(
        self, artifact: Artifact, options: LoadOptions, *, context: int, threads: int, target: str
    ) -> None:
        self._options = options
        self._threads = threads
        self._native = native = NativeModel(artifact.weights, mmap=options.mmap)
        self._cache: Cache | None = None
        self._draft: DraftModel | None = None
        self._vision: Vision | None = None
        try:
            self._vision = self._load_vision()
            self._adapters = {name: native.adapter(Path(file)) for name, file in options.adapters}
            guesses = DRAFT if options.draft else options.lookup
            outputs = options.slots * (1 + guesses)
            self._scheduler = Scheduler(
                native,
                lambda: self._open_cache(context, outputs, artifact),
                limit=context,
                slots=options.slots,
                drafter=self._drafter(context),
            )
        except BaseException:
            self._free()
            raise
        self.info = ModelInfo(
            name=artifact.name,
            architecture=artifact.description.architecture,
            context=context,  # llama.cpp's own may be rounded up
            vocabulary=native.vocabulary,
            parameters=native.parameters,
            target=target,
            trained_context=native.trained_context,
            details={"threads": threads, "kv_type": options.kv_type, "slots": options.slots},
            vision=self._vision is not None,
        )
        self.template = ChatTemplate(
            native.chat_template(),
            bos=native.token_text(native.bos),
            eos=native.token_text(native.eos),
            control_tokens=native.control_tokens(),
            vision=self._vision is not None,
        )
        self._closed = False

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk]:
        self._check_open()
        sampling = sampling or Sampling()
        tokens, images = self._placed(prompt)
        if not tokens:
            raise BadInput("the prompt is empty", hint="Give at least one token of text.")
        if len(tokens) >= self.info.context:
            raise ContextExceeded(len(tokens) + 1, self.info.context)
        request = self._request(tokens, images, sampling)
        if request.limit == 0:
            request.sampler.close()
            return (c for c in [Chunk(finish_reason="length", usage=Usage(prompt_tokens=len(tokens)))])
        return PushedChunks(lambda deliver: self._begin(request, deliver))

    def _placed(self, prompt: Prompt) -> tuple[list[int], list[Image]]:
        """A prompt's tokens, and the images among them."""
        if isinstance(prompt, str):
            return self.tokenize(prompt, bos=True), []
        if self._vision is None:
            return self._checked(without_images(prompt, self.info.name)), []
        self._checked([item for item in prompt if not isinstance(item, bytes)])
        return self._vision.place(prompt)

    def _request(self, tokens: list[int], images: list[Image], sampling: Sampling) -> Request:
        shift = self._options.shift and not images  # half of an image means nothing
        room = self.info.context - len(tokens)
        wanted = room if sampling.max_tokens is None else sampling.max_tokens
        shown = {
            t for text in sampling.keep_special for t in self._native.tokenize(text, bos=False, special=True)
        }
        request = Request(
            tokens,
            sampling,
            Sampler(sampling, self._native),
            TextStream(sampling.stop),
            limit=wanted if shift else min(wanted, room),
            adapters=self._chosen_adapters(sampling),
            shift=shift,
            shown_special=frozenset(shown),
            images=images,
        )
        request.sampler.accept_prompt([t for t in tokens if t >= 0] if images else tokens)
        return request

    def _begin(self, request: Request, deliver: Deliver) -> Cancel:
        request.deliver = deliver
        self._scheduler.submit(request)

        def cancel() -> None:
            request.cancelled = True  # seen by the scheduler before its next step

        return cancel

    def score(self, tokens: Sequence[int], *, distribution: bool = False, top: int = 0) -> Scores:
        ids = self._checked(tokens)
        if len(ids) < 2:
            raise BadInput(f"score got {len(ids)} tokens", hint="It needs at least two.")
        if len(ids) > self.info.context:
            raise ContextExceeded(len(ids), self.info.context)
        return self._scheduler.work(self._score(ids, distribution, min(top, self.info.vocabulary)))

    def _score(self, ids: list[int], distribution: bool, top: int) -> Generator[None, None, Scores]:
        context = self._open_context(len(ids), sequences=1, outputs=BATCH)
        try:
            best: list[tuple[tuple[int, float], ...]] = []
            logprobs = np.empty(len(ids) - 1, np.float32)
            rows = np.empty((len(ids) - 1, self.info.vocabulary), np.float32) if distribution else None
            for at in range(0, len(ids) - 1, context.batch):
                part = ids[at : min(at + context.batch, len(ids) - 1)]
                count = len(part)
                context.decode(part, range(at, at + count), [0] * count, [True] * count)
                logp = _log_softmax(context.all_logits(count))
                logprobs[at : at + count] = logp[np.arange(count), ids[at + 1 : at + 1 + count]]
                if rows is not None:
                    rows[at : at + count] = logp
                best += [_likeliest(row, top) for row in logp] if top else []
                yield
        finally:
            context.close()
        return Scores(tuple(ids), logprobs, rows, tuple(best))

    def embed(self, texts: Sequence[str], *, pooling: str = "") -> FloatArray:
        ids = [self.tokenize(text, bos=True) for text in texts]
        return self._scheduler.work(self._embed(ids, pooling))

    def rerank(self, query: str, documents: Sequence[str]) -> list[float]:
        if self._native.pooling != "rank":
            return super().rerank(query, documents)
        separator = self._native.separator()
        pairs = [
            self.tokenize(query, bos=True) + separator + self.tokenize(d) + separator[:1] for d in documents
        ]
        return [float(x) for x in self._scheduler.work(self._embed(pairs, "rank"))[:, 0]]

    def _embed(self, ids: list[list[int]], pooling: str) -> Generator[None, None, FloatArray]:
        return embed(self._native, ids, pooling=pooling, threads=self._threads, flash_attention=self._flash)

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        self._check_open()
        return self._native.tokenize(text, bos=bos and self._native.adds_bos, special=special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        self._check_open()
        return self._native.detokenize(self._checked(tokens), special=special)

    def metrics(self) -> dict[str, float]:
        return self._scheduler.gauges()

    def progress(self) -> int:
        return NativeContext.decoded  # also those of scores and embeddings

    @property
    def alive(self) -> bool:
        return self._scheduler.alive

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._scheduler.close()
            self._free()

    # -- inside ----------------------------------------------------------------------------------

    def _drafter(self, context: int) -> Drafter | None:
        if self._options.draft:
            self._draft = DraftModel(
                Path(self._options.draft),
                self._native,
                context=context,
                slots=self._options.slots,
                batch=BATCH,
                threads=self._threads,
            )
            return self._draft
        return PromptLookup(self._options.lookup) if self._options.lookup else None

    def _prompt_cache(self, artifact: Artifact) -> PromptCache | None:
        if not self._options.prompt_cache or not self._native.movable:
            return None
        key = (artifact.digest or artifact.name).removeprefix("sha256:")[:24]
        return PromptCache(Path(self._options.prompt_cache) / f"{key}-{self._options.kv_type}")

    def _load_vision(self) -> Vision | None:
        if not self._options.projector:
            return None
        from alight_targets.llama_cpp.vision import Vision  # loads another library

        return Vision(
            Path(self._options.projector),
            self._native,
            batch=BATCH,
            threads=self._threads,
            flash_attention=self._flash,
        )

    def _chosen_adapters(self, sampling: Sampling) -> Adapters:
        for name, _ in sampling.adapters:
            if name not in self._adapters:
                known = ", ".join(sorted(self._adapters)) or "none"
                raise BadInput(f"no adapter {name!r} is loaded", hint=f"Loaded: {known}.")
        return tuple((self._adapters[name], scale) for name, scale in sampling.adapters)

    @property
    def _flash(self) -> bool:
        """On x86-64, flash attention reads long prompts quicker but decodes slower: 24 against 62 tokens/s for
        SmolLM2-135M at 2,048 tokens. Quantized values need it, and on Arm the choice is not measured yet."""
        chosen = self._options.flash_attention
        if chosen is None:
            return platform.machine() not in _X86 or self._options.kv_type != "f16"
        return chosen

    def _open_cache(self, context: int, outputs: int, artifact: Artifact) -> Cache:
        sequences = self._options.slots + KEPT
        self._cache = Cache(
            lambda count, unified: self._open_context(
                context, sequences=count, outputs=outputs, unified=unified
            ),
            Layouts(
                cells=-(-context // PAGE) * PAGE,
                sequences=sequences,
                fixed=not self._native.movable or self._vision is not None,
            ),
            shares=not self._native.recurrent,
            limit=context,
            prompts=self._prompt_cache(artifact),
        )
        return self._cache

    def _open_context(
        self, context: int, *, sequences: int, outputs: int, unified: bool = True
    ) -> NativeContext:
        return NativeContext(
            self._native,
            context=context,
            batch=BATCH,
            # Without flash attention the scores of all tokens with all cells need memory; prompts are read as
            # quickly in smaller pieces.
            # (But the tokens of an image may see each other; llama.cpp aborts if it is cut.)
            ubatch=BATCH if self._flash or self._vision else BATCH // 4,
            outputs=outputs,
            threads=self._threads,
            sequences=sequences,
            unified=unified,
            kv_type=self._options.kv_type,
            flash_attention=self._flash,
        )

    def _free(self) -> None:
        for part in (self._draft, self._cache, self._vision, self._native):
            if part:
                part.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"model {self.info.name!r} is closed", hint="Load it again.")

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = list(tokens)
        bad = next((t for t in ids if not 0 <= t < self.info.vocabulary), None)
        if bad is not None:
            raise BadInput(f"token {bad} is outside the vocabulary of {self.info.vocabulary}")
        return ids


def _likeliest(logp: FloatArray, count: int) -> tuple[tuple[int, float], ...]:
    found = np.argpartition(logp, -count)[-count:]
    return tuple((int(t), float(logp[t])) for t in found[np.argsort(-logp[found], kind="stable")])


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted: FloatArray = logits - logits.max(axis=1, keepdims=True)
    logp: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logp
