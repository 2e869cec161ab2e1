"""One request on its way through the scheduler."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from queue import SimpleQueue

from alight.target import Chunk, FinishReason, Sampling, TokenLogprob, Usage
from alight.text import TextStream
from alight_targets.common.sampler import Sampler

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
    shift: bool = False  # go on when the context is full, without its oldest part
    shown_special: frozenset[int] = frozenset()  # control tokens whose text is shown
    out: SimpleQueue[Chunk | Exception] = field(default_factory=SimpleQueue)
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
        self.out.put(Chunk(text, (token,), logprobs=(logprob,) if logprob else ()))

    def show_life(self) -> None:
        """An empty chunk while it waits or reads, so that its consumer can notice a client that left."""
        if self.out.empty():
            self.out.put(Chunk())

    def end(self, reason: FinishReason) -> None:
        """Tell the consumer that this was all."""
        now = time.perf_counter()
        first = self.first_token or now
        usage = Usage(
            prompt_tokens=self.prompt,
            completion_tokens=self.made,
            prompt_seconds=first - self.submitted,
            decode_seconds=now - first,
            cached_tokens=self.cached,
        )
        self.out.put(Chunk(self.stream.finish(), (), reason, usage))
