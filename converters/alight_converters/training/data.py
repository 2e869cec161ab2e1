"""Rows of tokens to train on, and the order in which they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alight.errors import BadInput


@dataclass(frozen=True)
class Batch:
    """Some rows.

    Attributes:
        tokens: (rows, length), int64. Padding is at the end.
        learned: (rows, length), bool: the tokens that are to be predicted. Never the first of a row.
        rows: (rows,) which rows of the training data these are; -1 for rows made on the way.
    """

    tokens: Tensor
    learned: Tensor
    rows: Tensor

    @classmethod
    def of(cls, tokens: Tensor, learned: Tensor | None = None, rows: Tensor | None = None) -> Batch:
        """Everything is learned where nothing else is said."""
        learned = torch.ones_like(tokens, dtype=torch.bool) if learned is None else learned.clone()
        learned[:, 0] = False
        return cls(tokens, learned, torch.full((len(tokens),), -1) if rows is None else rows)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def predicting(self) -> Tensor:
        """(rows, length - 1), bool: the positions whose next token is learned."""
        return self.learned[:, 1:]

    def take(self, rows: Tensor) -> Batch:
        return Batch(self.tokens[rows], self.learned[rows], rows)

    def split(self, rows: int) -> Iterator[Batch]:
        """Parts of `rows` rows; the last one may be smaller."""
        for i in range(0, len(self), rows):
            yield Batch(self.tokens[i : i + rows], self.learned[i : i + rows], self.rows[i : i + rows])

    def to(self, device: str) -> Batch:
        return Batch(self.tokens.to(device), self.learned.to(device), self.rows)


class Batches(Protocol):
    """Where the trainer gets rows from."""

    def __call__(self, step: int, size: int, rank: int, processes: int) -> Batch:
        """This process's share of the `size` rows of a step. Depends on nothing but its arguments."""


@dataclass(frozen=True)
class Shuffled:
    """All rows again and again, each time in another order, which the seed decides."""

    data: Batch
    seed: int

    def __post_init__(self) -> None:
        if len(self.data) == 0 or not bool(self.data.predicting.any()):
            raise BadInput("there are no tokens to train on", hint="Give a longer calibration text.")

    def __call__(self, step: int, size: int, rank: int, processes: int) -> Batch:
        wanted = range(step * size, (step + 1) * size)[rank::processes]
        orders = {epoch: self._order(epoch) for epoch in {i // len(self.data) for i in wanted}}
        rows = [int(orders[i // len(self.data)][i % len(self.data)]) for i in wanted]
        return self.data.take(torch.tensor(rows))

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        return torch.randperm(len(self.data), generator=generator)


def seed_of(seed: int, *parts: int) -> int:
    """A seed of its own for each part of a run, for example each step: a resumed run needs no history."""
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (1 << 62)
    return seed
