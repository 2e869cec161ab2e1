"""Chooses the next token from logits, with NumPy.

The options and their order are those of llama.cpp's chain, so that a request gets the same distribution from a
GGUF and from any other form of a model: bias, penalties, DRY, top-k, typical, top-p, min-p, XTC, temperature.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alight.errors import BadInput, EngineError
from alight.target import Sampling, TokenLogprob
from alight_targets.common.dry import Dry
from alight_targets.common.guidance import Guide
from alight_targets.common.tokenizer import Tokenizer

if TYPE_CHECKING:
    from alight.target import FloatArray

_LARGEST_BIAS = 1e30  # as good as infinite, and no infinity in the softmax
_MIROSTAT_TOKENS = 100  # from which mirostat 1 estimates how the probabilities fall off


class Sampler:
    """Chooses tokens for one request. It is used from one thread.

    Args:
        vocabulary: columns of the logits.
        guide: what the text must follow; its place moves on with every token.

    Raises:
        BadInput: `logit_bias` names a token outside the vocabulary.
    """

    def __init__(
        self, sampling: Sampling, tokenizer: Tokenizer, vocabulary: int, guide: Guide | None = None
    ) -> None:
        self._sampling = s = sampling
        self._tokenizer = tokenizer
        self._guide = guide
        self._random = np.random.default_rng(secrets.randbits(64) if s.seed is None else s.seed & (2**64 - 1))
        bias = dict(s.logit_bias)
        if outside := [token for token in bias if not 0 <= token < vocabulary]:
            raise BadInput(f"logit_bias names token {outside[0]}", hint=f"The vocabulary has {vocabulary}.")
        if s.ignore_eos:
            bias |= dict.fromkeys(tokenizer.ends, -math.inf)
        self._biased = np.array(list(bias), np.int64)
        self._bias = np.minimum(np.array(list(bias.values()), np.float32), _LARGEST_BIAS)
        self._penalizes = bool(s.repeat_penalty != 1 or s.frequency_penalty or s.presence_penalty)
        self._dry = Dry(sampling, tokenizer) if s.dry_multiplier else None
        self._surprise = 2 * s.mirostat_tau  # mirostat's mu, bits
        # Nothing can make another token the likeliest, unless it is one of these.
        plain = (
            s.temperature == 0 and not self._penalizes and self._dry is None and not (self._bias > 0).any()
        )
        self._lowered = frozenset(bias) if plain else None

    @property
    def finished(self) -> bool:
        """Does the grammar end here?"""
        return self._guide is not None and self._guide.finished

    def sample(self, logits: FloatArray, tokens: Sequence[int]) -> int:
        """The next token; it counts as said.

        Args:
            logits: after the last token, shape (vocabulary,); left as they are.
            tokens: of the prompt and the answer so far, which penalties look at.

        Raises:
            EngineError: the logits are not numbers, or nothing is allowed.
        """
        token = self._likeliest(logits)
        if token is None:
            token = self._choose(self._adjusted(logits, tokens))
        if self._guide is not None and token not in self._tokenizer.ends:
            self._guide.accept(token)
        return token

    def logprob(self, logits: FloatArray, token: int) -> TokenLogprob:
        """The log-probability of a token, before any sampling option, and the best ones."""
        logp = logits.astype(np.float64)
        logp -= logp.max()
        logp -= np.log(np.exp(logp).sum())
        piece = self._tokenizer.piece
        top = tuple(
            (t, piece(t, special=True), float(logp[t])) for t in likeliest(logp, self._sampling.logprobs or 0)
        )
        return TokenLogprob(token, piece(token, special=True), float(logp[token]), top)

    # -- inside ----------------------------------------------------------------------------------

    def _likeliest(self, logits: FloatArray) -> int | None:
        """The answer to a plain greedy request, without touching the whole vocabulary more than once."""
        if self._lowered is None:
            return None
        token = int(logits.argmax())
        if token in self._lowered or (self._guide is not None and not self._guide.allows(token)):
            return None
        if not math.isfinite(logits[token]):
            raise _no_numbers()
        return token

    def _adjusted(self, logits: FloatArray, tokens: Sequence[int]) -> FloatArray:
        """The logits with everything that changes single ones."""
        logits = logits.copy()
        if len(self._biased):
            logits[self._biased] += self._bias
        if self._penalizes:
            self._penalize(logits, tokens)
        if self._dry:
            self._dry.apply(logits, tokens)
        if self._guide is not None:
            logits[~self._guide.mask(len(logits))] = -np.inf
        return logits

    def _penalize(self, logits: FloatArray, tokens: Sequence[int]) -> None:
        s = self._sampling
        recent = tokens if s.repeat_last_n < 0 else tokens[len(tokens) - min(s.repeat_last_n, len(tokens)) :]
        said, counts = np.unique(np.array(recent, np.int64), return_counts=True)
        values = logits[said]
        # Where a logit is negative, dividing would make the token likelier.
        values = np.where(values <= 0, values * s.repeat_penalty, values / s.repeat_penalty)
        logits[said] = values - counts * s.frequency_penalty - s.presence_penalty

    def _choose(self, logits: FloatArray) -> int:
        s = self._sampling
        best = logits.max()
        if not math.isfinite(best):
            raise _no_numbers()
        if s.temperature == 0:
            return int(logits.argmax())
        if s.mirostat:
            return self._mirostat(_Candidates.of(logits / np.float32(s.temperature)))
        candidates = _Candidates.of(logits, s.top_k)
        if s.typical_p < 1:
            candidates = candidates.typical(s.typical_p)
        if s.top_p < 1:
            candidates = candidates.top_p(s.top_p)
        if s.min_p > 0:
            candidates = candidates.min_p(s.min_p)
        if s.xtc_probability and self._random.random() <= s.xtc_probability:
            candidates = candidates.without_top(s.xtc_threshold)
        return candidates.heated(s.temperature).draw(self._random)[0]

    def _mirostat(self, candidates: _Candidates) -> int:
        """Basu et al. 2021, https://arxiv.org/abs/2007.14966: truncate so that the text is as surprising as asked."""
        s = self._sampling
        if s.mirostat == 1:
            candidates = candidates.first(_top_k_for(candidates.probabilities, self._surprise))
        else:
            surprises = -np.log2(candidates.probabilities)
            candidates = candidates.first(
                max(1, int(np.searchsorted(surprises, self._surprise, side="right")))
            )
        token, probability = candidates.draw(self._random)
        self._surprise -= s.mirostat_eta * (-math.log2(probability) - s.mirostat_tau)
        return token


class _Candidates:
    """Tokens that may come next and their logits, likeliest first."""

    def __init__(self, ids: NDArray[np.int64], logits: FloatArray) -> None:
        self._ids = ids
        self._logits = logits
        exp = np.exp((logits - logits[0]).astype(np.float64))
        self.probabilities: NDArray[np.float64] = exp / exp.sum()

    @classmethod
    def of(cls, logits: FloatArray, top_k: int = 0) -> _Candidates:
        """The likeliest `top_k`; 0 is all that are allowed."""
        ids = likeliest(logits, top_k or len(logits))
        ids = ids[np.isfinite(logits[ids])]
        return cls(ids, logits[ids])

    def first(self, count: int) -> _Candidates:
        return _Candidates(self._ids[:count], self._logits[:count])

    def typical(self, p: float) -> _Candidates:
        """Locally typical sampling, Meister et al. 2022, https://arxiv.org/abs/2202.00666."""
        surprise = -np.log(np.maximum(self.probabilities, 1e-300))
        off = np.abs(surprise - (self.probabilities * surprise).sum())
        order = np.argsort(off, kind="stable")
        count = int(np.searchsorted(self.probabilities[order].cumsum(), p, side="right")) + 1
        kept = np.sort(order[:count])
        return _Candidates(self._ids[kept], self._logits[kept])

    def top_p(self, p: float) -> _Candidates:
        return self.first(int(np.searchsorted(self.probabilities.cumsum(), p)) + 1)

    def min_p(self, p: float) -> _Candidates:
        return self.first(int(np.count_nonzero(self._logits >= self._logits[0] + math.log(p))))

    def without_top(self, threshold: float) -> _Candidates:
        """XTC ("exclude top choices", https://github.com/oobabooga/text-generation-webui/pull/6335): of the tokens
        above the threshold, only the least likely stays."""
        above = int(np.count_nonzero(self.probabilities >= threshold))
        cut = max(0, above - 1) if threshold <= 0.5 else 0
        return _Candidates(self._ids[cut:], self._logits[cut:])

    def heated(self, temperature: float) -> _Candidates:
        return _Candidates(self._ids, self._logits / np.float32(temperature))

    def draw(self, random: np.random.Generator) -> tuple[int, float]:
        """A token by its probability, and that."""
        cumulative = self.probabilities.cumsum()
        at = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
        at = min(at, len(cumulative) - 1)
        return int(self._ids[at]), float(self.probabilities[at])


def likeliest(logits: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The ids of the `count` largest logits, largest first and smaller ids before larger ones."""
    count = min(count, len(logits))
    if count == 0:
        return np.empty(0, np.int64)
    if count == len(logits):
        return np.argsort(-logits, kind="stable")
    found = np.sort(np.argpartition(logits, -count)[-count:])
    return found[np.argsort(-logits[found], kind="stable")]


def _top_k_for(probabilities: NDArray[np.float64], surprise: float) -> int:
    """Mirostat 1: how many tokens give that surprise (bits), if probabilities fall off as Zipf has it."""
    top = probabilities[:_MIROSTAT_TOKENS]
    top = top[top > 0]
    if len(top) < 2:
        return 1
    ranks = np.arange(1, len(top))
    logs = np.log((ranks + 1) / ranks)
    exponent = float((logs * np.log(top[:-1] / top[1:])).sum() / (logs**2).sum())
    excess = exponent - 1
    if abs(excess) < 1e-9 or exponent <= 0:
        return len(probabilities)
    ratio = excess * 2**surprise / (1 - len(probabilities) ** -excess)
    return max(1, int(min(ratio ** (1 / exponent), len(probabilities))))


def _no_numbers() -> EngineError:
    return EngineError(
        "the model gives no token that may come next",
        hint="Its weights may be damaged, or logit_bias and the grammar leave nothing over.",
    )
