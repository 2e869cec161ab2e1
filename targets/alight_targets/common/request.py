"""One request on its way through the scheduler."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from alight.pushed import Deliver
from alight.target import Chunk, FinishReason, Sampling, TokenLogprob, Usage
from alight.text import TextStream
from alight_targets.common.sampler import Sampler

log = logging.getLogger("alight.targets")

Adapters = tuple[tuple[str, float], ...]


@dataclass(slots=True, eq=False)
class Request:
    """What the scheduler knows of a request.

    `tokens` is the prompt and all that was generated; `kv` says how many of them are in the KV cache.
    """

    tokens: list[int]
    sampling: Sampling
    sampler: Sampler
    stream: TextStream
    limit: int  # tokens to generate at most
    deliver: Deliver = field(default=lambda _: None)  # takes its chunks, or the error that ends it
    shift: bool = False  # go on when the context is full, without its oldest part
    shown_special: frozenset[int] = frozenset()  # control tokens whose text is shown
    cancelled: bool = False
    prompt: int = 0  # tokens of the prompt
    kv: int = 0
    sequence: int = -1  # in the backend; -1 while it waits
    made: int = 0
    cached: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def decoding(self) -> bool:
        """Is only its last token missing in the KV cache?"""
        return self.kv == len(self.tokens) - 1 and self.made > 0

    def say(self, text: str, token: int, logprob: TokenLogprob | None) -> None:
        self.tell(Chunk(text, (token,), logprobs=(logprob,) if logprob else ()))

    def tell(self, item: Chunk | Exception) -> None:
        """Deliver, whatever the receiver does: the engine serves others, too."""
        try:
            self.deliver(item)
        except Exception:
            log.exception("whoever asked does not take the answer")
            self.cancelled = True

    def end(self, reason: FinishReason) -> None:
        """Tell that this was all."""
        now = time.perf_counter()
        first = self.first_token or now
        usage = Usage(
            prompt_tokens=self.prompt,
            completion_tokens=self.made,
            prompt_seconds=first - self.submitted,
            decode_seconds=now - first,
            cached_tokens=self.cached,
        )
        self.tell(Chunk(self.stream.finish(), (), reason, usage))
