"""What the backends of this target can beyond a plain one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alight_targets.common.backend import Backend

if TYPE_CHECKING:
    from alight.target import FloatArray


class OnnxBackend(Backend):
    """A Backend over a decoder graph."""

    @abstractmethod
    def hidden(self, tokens: Sequence[int]) -> FloatArray:
        """The last hidden states of a text, shape (len(tokens), width), where the graph gives them."""
