"""Calibration: the token rows that passes look at activations and train on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from alight.errors import BadInput


@dataclass(frozen=True)
class Calibration:
    """Rows of token ids.

    Attributes:
        rows: shape (rows, length), int64, on the CPU. No padding: every token counts.
        origin: where the text came from, for the report.
    """

    rows: torch.Tensor
    origin: str

    @property
    def tokens(self) -> int:
        return self.rows.numel()

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()}"

    def first(self, rows: int) -> Calibration:
        """The first rows only. Raises BadInput where there are fewer."""
        if rows > len(self.rows):
            raise BadInput(
                f"the calibration text has {len(self.rows)} rows of {self.rows.shape[1]} tokens, {rows} are wanted",
                hint="Give a longer text.",
            )
        return Calibration(self.rows[:rows], self.origin)
