"""DRY ("don't repeat yourself"): makes tokens less likely that would go on with a repetition.

https://github.com/oobabooga/text-generation-webui/pull/5677, with the details of llama.cpp's implementation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from alight.target import Sampling
from alight_targets.common.tokenizer import Tokenizer

if TYPE_CHECKING:
    from alight.target import FloatArray

_LARGEST_EXPONENT = 88.7228391  # log of the largest float32
_LONGEST_BREAKER = 20  # tokens

# By its first token: how a text goes on that breaks sequences; an empty rest where that token is all of it.
Breakers = Mapping[int, Sequence[tuple[int, ...]]]


class Dry:
    """The penalty of one request."""

    def __init__(self, sampling: Sampling, tokenizer: Tokenizer) -> None:
        self._sampling = sampling
        self._breakers = _breakers(tokenizer, sampling.dry_sequence_breakers)
        base = sampling.dry_base
        self._most = int(_LARGEST_EXPONENT / math.log(base)) if base > 1.000001 else 0

    def apply(self, logits: FloatArray, tokens: Sequence[int]) -> None:
        """Lower the logits of tokens that would repeat what `tokens` have already, by how long it would be."""
        s = self._sampling
        recent = tokens if s.dry_penalty_last_n < 0 else tokens[max(0, len(tokens) - s.dry_penalty_last_n) :]
        if len(recent) <= s.dry_allowed_length:
            return
        longest = self._since_breaker(recent)
        if longest < s.dry_allowed_length:
            return
        # Longer repetitions are not penalized more.
        longest = min(longest, s.dry_allowed_length + self._most)
        for token, length in _continuations(np.array(recent, np.int64), longest).items():
            if length >= s.dry_allowed_length and () not in self._breakers.get(token, ()):
                logits[token] -= s.dry_multiplier * s.dry_base ** (length - s.dry_allowed_length)

    def _since_breaker(self, tokens: Sequence[int]) -> int:
        """How many tokens there are after the last sequence breaker."""
        for back, token in enumerate(reversed(tokens)):
            at = len(tokens) - 1 - back
            fitting = [
                len(rest)
                for rest in self._breakers.get(token, ())
                if len(rest) <= back and tuple(tokens[at + 1 : at + 1 + len(rest)]) == rest
            ]
            if fitting:
                return back - max(fitting)
        return len(tokens)


def _continuations(tokens: np.ndarray[tuple[int], np.dtype[np.int64]], longest: int) -> dict[int, int]:
    """What came after each place where the tokens are as at the end: the token, and how many agree before it."""
    found = dict.fromkeys(tokens[1:].tolist(), 0)
    ends = np.arange(len(tokens) - 1)  # a place: the index of its last token
    length = 0
    while len(ends) and length < longest:
        ends = ends[ends >= length]
        ends = ends[tokens[ends - length] == tokens[len(tokens) - 1 - length]]
        length += 1
        found |= dict.fromkeys(tokens[ends + 1].tolist(), length)
    return found


@lru_cache(maxsize=2)
def _breakers(tokenizer: Tokenizer, texts: tuple[str, ...]) -> Breakers:
    """The tokens in which the texts are or begin, each with the tokens of the rest."""
    found: dict[int, list[tuple[int, ...]]] = {}
    for text in filter(None, texts):
        data = text.encode()
        for token in range(tokenizer.vocabulary):
            piece = tokenizer.piece(token, special=True)
            if data in piece:
                rests: list[tuple[int, ...]] = [()]
            else:
                rests = [
                    _rest(tokenizer, data[size:])
                    for size in range(1, min(len(data), len(piece) + 1))
                    if piece.endswith(data[:size])
                ]
            found.setdefault(token, []).extend(rests)
    return {token: rests for token, rests in found.items() if rests}


def _rest(tokenizer: Tokenizer, data: bytes) -> tuple[int, ...]:
    return tuple(tokenizer.tokenize(data.decode(errors="ignore")))[:_LONGEST_BREAKER]
