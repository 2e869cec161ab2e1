"""One request on its way through the engine."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from alight.pushed import Deliver
from alight.target import Chunk, FinishReason, Sampling, TokenLogprob, Usage
from alight.text import TextStream
from alight_targets.llama_cpp.sampler import Sampler

if TYPE_CHECKING:
    from alight_targets.llama_cpp.vision import Image

log = logging.getLogger("alight.llama_cpp")

Adapters = tuple[tuple[int, float], ...]  # LoRA adapters in use: (pointer, scale)


@dataclass(slots=True, eq=False)
class Request:
    """What the scheduler knows of a request.

    `tokens` is the prompt and all that was generated; `kv` says how many of them are in the KV cache. A
    request that was preempted has `kv` zero again and simply reads its tokens once more. `images` are in
    `tokens`, too, by negative ids.
    """

    tokens: list[int]
    sampling: Sampling
    sampler: Sampler
    stream: TextStream
    limit: int  # tokens to generate at most
    deliver: Deliver = field(default=lambda _: None)  # takes its chunks, or the error that ends it
    adapters: Adapters = ()
    shift: bool = False  # go on when the context is full, without its oldest part
    shown_special: frozenset[int] = frozenset()  # control tokens whose text is shown
    images: list[Image] = field(default_factory=list)  # in their order
    said: list[Chunk] = field(default_factory=list)  # in this step
    cancelled: bool = False
    prompt: int = 0  # tokens of the prompt
    kv: int = 0
    sequence: int = -1  # in the KV cache; -1 while it waits
    draft: list[int] = field(default_factory=list)  # guesses for the next tokens
    made: int = 0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def decoding(self) -> bool:
        """Is only its last token missing in the KV cache?"""
        return self.kv == len(self.tokens) - 1 and self.made > 0

    def position(self, index: int) -> int:
        """The position in the KV cache of the token at `index`, which is not inside of an image."""
        if not self.images:
            return index
        return index - sum(len(i.ids) - i.positions for i in self.images if i.end <= index)

    def next_image(self) -> Image | None:
        """The first image that is not read."""
        return next((image for image in self.images if image.end > self.kv), None)

    def next_text(self, room: int) -> list[int]:
        """The next tokens to read, `room` at most; none where an image is next."""
        image = self.next_image() if self.images else None
        end = self.kv + room if image is None else min(self.kv + room, image.start)
        return self.tokens[self.kv : end]

    def without_half_image(self, length: int) -> int:
        """`length` tokens, or fewer if those would end inside of an image."""
        return next((image.start for image in self.images if image.start < length < image.end), length)

    def say(self, text: str, token: int, logprob: TokenLogprob | None) -> None:
        self.said.append(Chunk(text, (token,), logprobs=(logprob,) if logprob else ()))

    def hand_over(self) -> None:
        """Deliver what was said. Apart from saying it, so that nobody wakes up while others wait for their token."""
        said, self.said = self.said, []
        if len(said) > 1:  # guesses that were right, and the end
            said = [
                Chunk(
                    "".join(chunk.text for chunk in said),
                    tuple(token for chunk in said for token in chunk.tokens),
                    said[-1].finish_reason,
                    said[-1].usage,
                    tuple(one for chunk in said for one in chunk.logprobs),
                )
            ]
        for chunk in said:
            self.tell(chunk)

    def tell(self, item: Chunk | Exception) -> None:
        """Deliver, whatever the receiver does: the engine serves others, too."""
        try:
            self.deliver(item)
        except Exception:
            log.exception("whoever asked does not take the answer")
            self.cancelled = True

    def end(self, reason: FinishReason) -> None:
        """Say that this was all."""
        now = time.perf_counter()
        first = self.first_token or now
        usage = Usage(
            prompt_tokens=self.prompt,
            completion_tokens=self.made,
            prompt_seconds=first - self.submitted,
            decode_seconds=now - first,
            cached_tokens=self.cached,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )
        self.said.append(Chunk(self.stream.finish(), (), reason, usage))
