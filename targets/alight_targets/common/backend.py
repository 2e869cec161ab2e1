"""The smallest engine that `BatchedModel` can make a whole model of: it holds sequences and computes logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alight.errors import Unsupported

if TYPE_CHECKING:
    from alight.target import FloatArray


class Backend(ABC):
    """Sequences of tokens in a KV cache. Used from one thread only. A sequence is known by a small number.
    Logits are read before the next call, so that it may use their memory again.

    Attributes:
        vocabulary: columns of the logits.
        context: tokens that one sequence can hold.
        slots: sequences that can be there at once.
        details: what it wants to tell people, such as the processor it runs on.
    """

    vocabulary: int
    context: int
    slots: int
    details: Mapping[str, Any] = {}

    @abstractmethod
    def add(self, sequence: int) -> None:
        """Begin an empty sequence."""

    @abstractmethod
    def remove(self, sequence: int) -> None:
        """Forget a sequence; its room is free again."""

    @abstractmethod
    def rewind(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens of a sequence."""

    def fork(self, parent: int, child: int, length: int) -> bool:
        """Begin `child` with the first `length` tokens of `parent`, without computing them again; False where the
        engine cannot."""
        return False

    def adapt(self, sequence: int, adapters: Sequence[tuple[str, float]]) -> None:
        """Use LoRA adapters, by name and scale, for a sequence that has just begun.

        Raises:
            BadInput: no adapter of that name is loaded.
        """
        raise Unsupported(
            "this target has no LoRA adapters", hint="Merge the adapter into the model instead."
        )

    @abstractmethod
    def extend(self, sequence: int, tokens: Sequence[int]) -> FloatArray:
        """Append tokens (one at least) and return the logits after the last one, shape (vocabulary,)."""

    @abstractmethod
    def decode(self, sequences: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """Append one token to each of the sequences; the logits after them, shape (len(sequences), vocabulary)."""

    @abstractmethod
    def logits(self, tokens: Sequence[int]) -> Iterator[FloatArray]:
        """The logits after every token of a text, in order, in blocks of shape (some, vocabulary)."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Safe to call twice."""
