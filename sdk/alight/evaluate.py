"""Measure a loaded model: quality against its source, and speed on this machine.

Quality comes from `Model.score`, the same code for every format, on the runtime that will serve it.

- perplexity: exp of the mean negative log-likelihood per token.
- KL: the Kullback-Leibler divergence KL(source || model) of the next-token distribution, in nats, mean
  and 99th percentile over tokens.
- top-1: the share of tokens where both models would pick the same next token greedily.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from alight.errors import BadInput
from alight.target import Completion, Model, Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WINDOW = 256  # tokens scored together; the first half of a window gives context to the second
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Quality:
    """Measured on `tokens` predictions. KL and top-1 are against the source model; None without one."""

    tokens: int
    perplexity: float
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over `rounds`. Tokens per second of one stream; `first_token` in seconds after `prompt_tokens`."""

    prefill: float
    decode: float
    first_token: float
    prompt_tokens: int
    rounds: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Reference:
    """The source model's next-token log-probabilities on fixed windows of tokens.

    Kept as float16, which rounds each log-probability by at most 0.05 % of its size: small against
    the divergences measured, and half the memory.
    """

    windows: tuple[tuple[int, ...], ...]
    distributions: tuple[NDArray[np.float16], ...]

    @classmethod
    def of(
        cls, source: Model, windows: Sequence[Sequence[int]], progress: Progress | None = None
    ) -> Reference:
        import numpy as np

        kept = []
        for i, window in enumerate(windows):
            scores = source.score(window, distribution=True)
            if scores.distribution is None:
                raise BadInput(
                    f"target {source.info.target!r} gives no distributions", hint="Use the cpu target."
                )
            kept.append(scores.distribution[_half(window) :].astype(np.float16))
            if progress:
                progress("source", i + 1, len(windows))
        return cls(tuple(tuple(w) for w in windows), tuple(kept))


def windows_of(model: Model, text: str, tokens: int, *, window: int = WINDOW) -> list[list[int]]:
    """Cut a text into windows of tokens, `tokens` in all at most.

    Raises:
        BadInput: the text is too short for one window of at least 32 tokens.
    """
    window = min(window, model.info.context)
    ids = model.tokenize(text)[:tokens]
    cut = [ids[i : i + window] for i in range(0, len(ids), window)]
    cut = [w for w in cut if len(w) >= min(window, 32)]
    if not cut:
        raise BadInput(
            f"the text gives {len(ids)} tokens", hint="At least 32 are needed to measure anything."
        )
    return cut


def sample_text(
    source: Model, tokens: int, *, seed: int = 0, progress: Progress | None = None
) -> list[list[int]]:
    """Windows of text that the source model writes itself: nothing to download, and in its own distribution.

    Seeded: the same model, freshly loaded, and seed give the same text on the same machine. (A prompt that is
    in the KV cache already is computed in other batches, which round differently.)
    """
    window = min(WINDOW, source.info.context)
    count = max(1, tokens // window)
    starts = (
        "The",
        "In",
        "A",
        "How",
        "When",
        "def",
        "1.",
        "She",
        "To",
        "What",
        "Once",
        "Our",
        "Why",
        "It",
        "On",
        "If",
    )
    windows = []
    for i in range(count):
        prompt = source.tokenize(starts[i % len(starts)], bos=True)
        sampling = Sampling(max_tokens=window - len(prompt), temperature=0.8, seed=seed + i)
        made = Completion.of(source.generate(prompt, sampling)).tokens
        windows.append([*prompt, *made])
        if progress:
            progress("sampling text", i + 1, count)
    return [w for w in windows if len(w) >= 16] or windows


def quality(model: Model, windows: Sequence[Sequence[int]], progress: Progress | None = None) -> Quality:
    """Perplexity alone, where there is no source model to compare with."""
    total, count = 0.0, 0
    for i, window in enumerate(windows):
        part = model.score(window).logprobs[_half(window) :]
        total -= float(part.sum())
        count += len(part)
        if progress:
            progress(model.info.name, i + 1, len(windows))
    return Quality(count, _exp(total / count))


def compare(model: Model, reference: Reference, progress: Progress | None = None) -> Quality:
    """Quality of a model against its source, on the reference's windows."""
    import numpy as np

    total, kls, same = 0.0, [], 0
    pairs = list(zip(reference.windows, reference.distributions, strict=True))
    for i, (window, expected) in enumerate(pairs):
        scores = model.score(window, distribution=True)
        if scores.distribution is None or scores.distribution.shape[1] != expected.shape[1]:
            raise BadInput(
                f"{model.info.name!r} has a vocabulary of {model.info.vocabulary}, "
                f"its source one of {expected.shape[1]}",
                hint="KL divergence needs models that share a tokenizer.",
            )
        half = _half(window)
        p = expected.astype(np.float32)
        q = scores.distribution[half:]
        kls.append((np.exp(p) * (p - q)).sum(axis=1))
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        total -= float(scores.logprobs[half:].sum())
        if progress:
            progress(model.info.name, i + 1, len(pairs))
    kl = np.concatenate(kls)
    return Quality(
        tokens=len(kl),
        perplexity=_exp(total / len(kl)),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=same / len(kl),
    )


def speed(model: Model, *, prompt_tokens: int = 128, new_tokens: int = 64, rounds: int = 3) -> Speed:
    """Single-stream speed: median of `rounds`, after one warm-up. Each round has a prompt of its own, so
    that no cache answers for the prefill."""
    prompt_tokens = min(prompt_tokens, model.info.context - new_tokens)
    if prompt_tokens < 1:
        raise BadInput(f"a context of {model.info.context} is too small to measure {new_tokens} new tokens")
    prefills, decodes, firsts = [], [], []
    for number, prompt in enumerate(_prompts(model, prompt_tokens, rounds + 1)):
        usage = Completion.of(model.generate(prompt, Sampling(max_tokens=new_tokens, temperature=0))).usage
        if number == 0:
            continue
        prefills.append(usage.prompt_tokens / usage.prompt_seconds)
        firsts.append(usage.prompt_seconds)
        if usage.tokens_per_second:
            decodes.append(usage.tokens_per_second)
    return Speed(
        prefill=statistics.median(prefills),
        decode=statistics.median(decodes) if decodes else 0.0,
        first_token=statistics.median(firsts),
        prompt_tokens=prompt_tokens,
        rounds=rounds,
    )


def _prompts(model: Model, length: int, count: int) -> Iterator[list[int]]:
    text = "It was a bright day, and the small boat went out to sea with bread, water and an old map. "
    for i in range(count):
        ids = model.tokenize(f"{i + 1}. " + text, bos=True)
        yield (ids * (length // len(ids) + 1))[:length]


def _half(window: Sequence[int]) -> int:
    """How many predictions of a window are left out because they have too little context."""
    return len(window) // 2 if len(window) >= 64 else 0


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))
