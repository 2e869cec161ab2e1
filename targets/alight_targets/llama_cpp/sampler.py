"""A Sampling as llama.cpp's sampler chain, in llama.cpp's own order.

A grammar is kept out of the chain: trying every token of the vocabulary against it is slow, and the token
that the chain picks usually follows it anyway. Only when it does not are all the others tried.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence

import llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from alight.errors import BadInput
from alight.target import Sampling, TokenLogprob
from alight_targets.llama_cpp.grammar import gbnf_of
from alight_targets.llama_cpp.native import NativeContext, NativeModel, complaint

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Sampler:
    """Chooses tokens from logits for one request. Close it."""

    def __init__(self, sampling: Sampling, model: NativeModel) -> None:
        self._model = model
        self._sampling = sampling
        self._history: list[
            tuple[object, int]
        ] = []  # samplers that also look at the prompt, and how far back
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed & 0xFFFFFFFF
        self._owned: list[object] = []
        self._grammar = self._make_grammar(gbnf_of(sampling))
        self._chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        self._owned.append(self._chain)
        self._fill_chain(sampling)
        # The likeliest token that nothing changes: NumPy finds it ten times quicker than a chain.
        self._banned = {t for t, b in self._bias.items() if b < 0}
        unbiased = len(self._banned) == len(self._bias)
        self._likeliest = (
            sampling.temperature == 0 and unbiased and self._grammar is None and not self._history
        )

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Let the penalties see the prompt, as far back as they look."""
        for sampler, reach in self._history:
            for token in tokens if reach < 0 else tokens[max(0, len(tokens) - reach) :]:
                C.llama_sampler_accept(sampler, token)

    def sample(self, context: NativeContext, index: int) -> int:
        """The next token after batch entry `index` of the last decode; the sampler counts it as said."""
        if self._likeliest:
            token = int(context.logits(index).argmax())
            if token not in self._banned:
                return token
        if self._grammar is None:
            return int(C.llama_sampler_sample(self._chain, context.pointer, index))
        logits = context.logits(index)
        token = self._pick(logits, grammar=False)
        if not self._follows_grammar(token):
            token = self._pick(logits, grammar=True)
        C.llama_sampler_accept(self._chain, token)
        if not self._model.is_end(token):
            C.llama_sampler_accept(self._grammar, token)
        return token

    def logprob(self, context: NativeContext, index: int, token: int) -> TokenLogprob:
        """The log-probability of a token at batch entry `index`, before any sampling option, and the best ones."""
        logits = context.logits(index).astype(np.float64)
        top = int(logits.argmax())
        logp = logits - (logits[top] + np.log(np.exp(logits - logits[top]).sum()))
        count = self._sampling.logprobs or 0
        best = np.argpartition(logp, -count)[-count:] if count else np.empty(0, np.int64)
        ranked = sorted(best.tolist(), key=lambda t: -logp[t])
        piece = self._model.piece
        return TokenLogprob(
            token,
            piece(token, special=True),
            float(logp[token]),
            tuple((t, piece(t, special=True), float(logp[t])) for t in ranked),
        )

    def close(self) -> None:
        """Free it. Safe to call twice."""
        owned = self._owned
        self._owned = []
        for sampler in owned:
            C.llama_sampler_free(sampler)

    def __del__(self) -> None:  # a request that never began
        self.close()

    # -- inside ----------------------------------------------------------------------------------

    def _fill_chain(self, s: Sampling) -> None:
        model = self._model
        bias = self._bias = dict(s.logit_bias)
        if s.ignore_eos:
            bias.update((t, float("-inf")) for t in model.end_tokens)
        for token in bias:
            if not 0 <= token < model.vocabulary:
                raise BadInput(
                    f"logit_bias names token {token}", hint=f"The vocabulary has {model.vocabulary}."
                )
        if bias:
            pairs = (C.llama_logit_bias * len(bias))(*(C.llama_logit_bias(t, b) for t, b in bias.items()))
            self._add(C.llama_sampler_init_logit_bias(model.vocabulary, len(bias), pairs))
        if s.repeat_penalty != 1 or s.frequency_penalty or s.presence_penalty:
            last_n = model.trained_context if s.repeat_last_n < 0 else s.repeat_last_n
            penalties = (s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
            penalty = C.llama_sampler_init_penalties(model.vocabulary, last_n, *penalties)
            self._add(penalty, sees_prompt=s.repeat_last_n)
        if s.dry_multiplier:
            breakers = (ctypes.c_char_p * len(s.dry_sequence_breakers))(
                *(b.encode() for b in s.dry_sequence_breakers)
            )
            last_n = model.trained_context if s.dry_penalty_last_n < 0 else s.dry_penalty_last_n
            settings = (s.dry_multiplier, s.dry_base, s.dry_allowed_length, last_n)
            dry = C.llama_sampler_init_dry(model.vocab, *settings, breakers, len(breakers))
            self._add(dry, sees_prompt=s.dry_penalty_last_n)
        if s.temperature == 0:
            self._add(C.llama_sampler_init_greedy())
            return
        if s.mirostat:
            self._add(C.llama_sampler_init_temp(s.temperature))
            if s.mirostat == 1:
                settings1 = (model.vocabulary, self.seed, s.mirostat_tau, s.mirostat_eta, 100)
                self._add(C.llama_sampler_init_mirostat(*settings1))
            else:
                self._add(C.llama_sampler_init_mirostat_v2(self.seed, s.mirostat_tau, s.mirostat_eta))
            return
        if s.top_k:
            self._add(C.llama_sampler_init_top_k(s.top_k))
        if s.typical_p < 1:
            self._add(C.llama_sampler_init_typical(s.typical_p, 1))
        if s.top_p < 1:
            self._add(C.llama_sampler_init_top_p(s.top_p, 1))
        if s.min_p > 0:
            self._add(C.llama_sampler_init_min_p(s.min_p, 1))
        if s.xtc_probability:
            self._add(C.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, 1, self.seed))
        self._add(C.llama_sampler_init_temp(s.temperature))
        self._add(C.llama_sampler_init_dist(self.seed))

    def _add(self, sampler: object, *, sees_prompt: int = 0) -> None:
        C.llama_sampler_chain_add(self._chain, sampler)
        if sees_prompt:
            self._history.append((sampler, sees_prompt))

    def _make_grammar(self, gbnf: str) -> object | None:
        if not gbnf:
            return None
        made = C.llama_sampler_init_grammar(self._model.vocab, gbnf.encode(), b"root")
        if not made:
            raise BadInput(
                f"the grammar is not valid GBNF: {complaint()}", hint="Its start rule is named root."
            )
        self._owned.append(made)
        return made  # type: ignore[no-any-return]

    def _pick(self, logits: NDArray[np.float32], *, grammar: bool) -> int:
        candidates = np.zeros(len(logits), _CANDIDATE)
        candidates["id"] = np.arange(len(logits), dtype=np.int32)
        candidates["logit"] = logits
        array = _array(candidates)
        if grammar:
            C.llama_sampler_apply(self._grammar, ctypes.byref(array))
        C.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _follows_grammar(self, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], _CANDIDATE)
        array = _array(one)
        C.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(np.isfinite(one["logit"][0]))


def _array(candidates: NDArray[np.void]) -> C.llama_token_data_array:
    data = candidates.ctypes.data_as(ctypes.POINTER(C.llama_token_data))
    return C.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
