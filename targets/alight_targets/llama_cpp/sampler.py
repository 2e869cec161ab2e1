"""A Sampling as llama.cpp's sampler chain, in llama.cpp's own order."""

from __future__ import annotations

import secrets
from types import TracebackType

import llama_cpp as C

from alight.target import Sampling
from alight_targets.llama_cpp.native import NativeContext, NativeModel


class Sampler:
    """Chooses tokens from logits. Close it, or use it in a `with` block."""

    def __init__(self, sampling: Sampling, model: NativeModel) -> None:
        self._chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        s = sampling
        if s.repeat_penalty != 1 or s.frequency_penalty or s.presence_penalty:
            last_n = model.trained_context if s.repeat_last_n < 0 else s.repeat_last_n
            penalties = (s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
            self._add(C.llama_sampler_init_penalties(model.vocabulary, last_n, *penalties))
        if s.temperature == 0:
            self._add(C.llama_sampler_init_greedy())
            return
        if s.top_k:
            self._add(C.llama_sampler_init_top_k(s.top_k))
        if s.top_p < 1:
            self._add(C.llama_sampler_init_top_p(s.top_p, 1))
        if s.min_p > 0:
            self._add(C.llama_sampler_init_min_p(s.min_p, 1))
        self._add(C.llama_sampler_init_temp(s.temperature))
        seed = secrets.randbits(32) if s.seed is None else s.seed & 0xFFFFFFFF
        self._add(C.llama_sampler_init_dist(seed))

    def _add(self, sampler: object) -> None:
        C.llama_sampler_chain_add(self._chain, sampler)

    def accept(self, tokens: list[int]) -> None:
        """Let penalties see the tokens of the prompt."""
        for token in tokens:
            C.llama_sampler_accept(self._chain, token)

    def sample(self, context: NativeContext, row: int = -1) -> int:
        """The next token after output row `row` of the last decode (and accept it)."""
        return int(C.llama_sampler_sample(self._chain, context.pointer, row))

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        C.llama_sampler_free(self._chain)
