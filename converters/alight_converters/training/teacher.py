"""What a student learns from: a teacher at work, its stored top-k probabilities, or plain tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from alight.errors import BadInput
from alight_converters.checkpoint import Checkpoint
from alight_converters.memory import RowsAtOnce
from alight_converters.passes import Progress
from alight_converters.training.data import Batch
from alight_converters.training.head import SplitModel
from alight_converters.training.losses import Divergence, LossOfChunk, over_top_k, through_head, with_rest
from alight_converters.training.shards import make_shards
from alight_converters.training.world import World

SHARD_ROWS = 64


class Teacher(Protocol):
    """Gives the loss of a batch's predicted positions, in row-major order, as a function of the student's logits."""

    def loss_of(self, batch: Batch) -> LossOfChunk: ...


@dataclass(frozen=True)
class LiveTeacher:
    """A model whose logits are computed when they are needed, and never kept."""

    model: SplitModel
    divergence: Divergence

    def loss_of(self, batch: Batch) -> LossOfChunk:
        with torch.no_grad():
            hidden = self.model.hidden(batch.tokens)
        return self.from_hidden(hidden, batch)

    def from_hidden(self, hidden: Tensor, batch: Batch) -> LossOfChunk:
        hidden = hidden[:, :-1][batch.predicting]

        def loss_of(student: Tensor, at: slice) -> Tensor:
            with torch.no_grad():
                teacher = self.model.finish(F.linear(hidden[at], self.model.weight))
            shared = min(student.shape[-1], teacher.shape[-1])  # beyond it, rows that only pad the vocabulary
            return self.divergence(
                self.divergence.log_probs(student[:, :shared]), self.divergence.log_probs(teacher[:, :shared])
            ).sum()

        return loss_of


@dataclass(frozen=True)
class StoredTeacher:
    """The k most likely next tokens of each position and their log-probabilities, read from disk.

    Attributes:
        files: shards of `SHARD_ROWS` rows: `ids` and `log_probs`, both (rows, length - 1, k).
        vocabulary: tokens that the teacher chooses from.
    """

    files: Sequence[Path]
    vocabulary: int
    divergence: Divergence

    @classmethod
    def store(
        cls,
        model: SplitModel,
        data: Batch,
        k: int,
        divergence: Divergence,
        folder: Path,
        world: World,
        progress: Progress,
        *,
        shared: int,
        rows_at_once: int = 8,
    ) -> StoredTeacher:
        """Run the teacher over all rows once. Shards that are in `folder` already are kept.

        Args:
            shared: rows of the student's head; the teacher's may have more.
            rows_at_once: through the teacher; fewer where they do not fit.
        """
        vocabulary = min(model.weight.shape[0], shared)  # beyond it, rows that only pad the vocabulary
        if not 1 <= k <= vocabulary:
            raise BadInput(f"top_k is {k}, there are {vocabulary} tokens to choose from")
        narrow = torch.uint16 if vocabulary <= 1 << 16 else torch.int32

        at_once = RowsAtOnce(
            rows_at_once,
            f"the teacher's top {k} over rows of {data.tokens.shape[1]} tokens",
            "Use shorter rows, or a device with more memory.",
        )

        @torch.no_grad()
        def top(rows: Batch, at_once: int) -> dict[str, Tensor]:
            ids, log_probs = [], []
            for part in rows.split(at_once):
                hidden = model.hidden(part.to(world.device).tokens)[:, :-1]
                logits = model.finish(F.linear(hidden, model.weight[:vocabulary]))
                kept = divergence.log_probs(logits).topk(k, dim=-1)
                ids.append(kept.indices.to(narrow))
                log_probs.append(kept.values)
            return {"ids": torch.cat(ids), "log_probs": torch.cat(log_probs)}

        def make(shard: int) -> dict[str, Tensor]:
            rows = data.take(torch.arange(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, len(data))))
            return at_once.run(partial(top, rows))

        count = -(-len(data) // SHARD_ROWS)
        files = make_shards(folder, count, make, world, progress, f"teacher's top {k}")
        return cls(files, vocabulary, divergence)

    def loss_of(self, batch: Batch) -> LossOfChunk:
        ids, log_probs = (self._read(name, batch) for name in ("ids", "log_probs"))
        teacher = log_probs if ids.shape[-1] == self.vocabulary else with_rest(log_probs)

        def loss_of(student: Tensor, at: slice) -> Tensor:
            seen = self.divergence.log_probs(student[:, : self.vocabulary])
            return self.divergence(over_top_k(seen, ids[at]), teacher[at]).sum()

        return loss_of

    def _read(self, name: str, batch: Batch) -> Tensor:
        found = []
        for row in batch.rows.tolist():
            with safe_open(self.files[row // SHARD_ROWS], framework="pt") as opened:
                found.append(opened.get_slice(name)[row % SHARD_ROWS])
        rows = torch.stack(found)
        rows = rows.long() if name == "ids" else rows
        return rows.to(batch.tokens.device)[batch.predicting]


class Tokens:
    """No teacher: the tokens themselves, by cross-entropy."""

    def loss_of(self, batch: Batch) -> LossOfChunk:
        following = batch.tokens[:, 1:][batch.predicting]

        def loss_of(student: Tensor, at: slice) -> Tensor:
            return F.cross_entropy(student.float(), following[at], reduction="sum")

        return loss_of


def student_loss(student: SplitModel, hidden: Tensor, batch: Batch, loss_of: LossOfChunk) -> Tensor:
    """Sum of a loss over a batch's predicted positions, from the student's hidden states."""
    return through_head(
        hidden[:, :-1][batch.predicting],
        student.weight,
        lambda logits, at: loss_of(student.finish(logits), at),
    )


def require_same_tokenizer(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raises BadInput where two models read token ids differently, and names the first that differs."""
    ours, theirs = (_vocabulary(c) for c in (student, teacher))
    if ours == theirs:
        return
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if first is None:
        first = min(len(ours), len(theirs))
        where = f"from token {first} on only one of them has any"
    else:
        where = f"token {first} is {ours[first]!r} in the student and {theirs[first]!r} in the teacher"
    raise BadInput(
        f"student {student.folder.name} and teacher {teacher.folder.name} have different vocabularies, of "
        f"{len(ours)} and {len(theirs)} tokens: {where}",
        hint="Logits can only be compared token by token: take a teacher with the student's tokenizer.",
    )


def _vocabulary(checkpoint: Checkpoint) -> list[str]:
    by_token = checkpoint.tokenizer().get_vocab()
    return sorted(by_token, key=by_token.__getitem__)
