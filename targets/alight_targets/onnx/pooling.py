"""From the hidden states of a text's tokens to one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from alight.errors import BadInput

if TYPE_CHECKING:
    from alight.target import FloatArray

POOLING = ("mean", "cls", "last")


def pool(states: FloatArray, how: str) -> FloatArray:
    """One vector of the hidden states of a text, shape (tokens, width).

    Raises:
        BadInput: `how` is none of the known ones.
    """
    if how not in POOLING:
        raise BadInput(f"pooling is {how!r}", hint=f"It must be one of {', '.join(POOLING)}.")
    if how == "mean":
        mean: FloatArray = states.mean(axis=0)
        return mean
    chosen: FloatArray = states[0 if how == "cls" else -1]
    return chosen


def unit(vectors: Sequence[FloatArray]) -> FloatArray:
    """The vectors as one array, each of length one."""
    if not vectors:
        return np.empty((0, 0), np.float32)
    stacked = np.stack(vectors).astype(np.float32)
    lengths = np.linalg.norm(stacked, axis=1, keepdims=True)
    scaled: FloatArray = stacked / np.maximum(lengths, 1e-12)
    return scaled
