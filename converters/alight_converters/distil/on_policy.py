"""On-policy rows: the student writes, and the teacher will say how likely each token was.

Agarwal et al. 2023, "On-Policy Distillation of Language Models" (GKD), algorithm 1.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alight.errors import BadInput
from alight_converters.memory import RowsAtOnce
from alight_converters.training.data import Batch, Batches, seed_of
from alight_converters.training.sampling import sample_what_fits, until_stop

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SomeOnPolicy:
    """With probability `share`, a step's rows are continued by the student from their first `prompt_tokens`.

    No gradient flows through the sampling. Which steps, and what is sampled, depends on seed and step only.
    """

    batches: Batches
    student: PreTrainedModel
    share: float
    prompt_tokens: int
    temperature: float
    seed: int
    at_once: RowsAtOnce

    def __call__(self, step: int, size: int, rank: int, processes: int) -> Batch:
        given = self.batches(step, size, rank, processes)
        length = given.tokens.shape[1]
        if self.prompt_tokens >= length:
            raise BadInput(f"prompt_tokens is {self.prompt_tokens}, rows have {length} tokens")
        if random.Random(seed_of(self.seed, step)).random() >= self.share:
            return given
        written = sample_what_fits(
            self.at_once,
            self.student,
            given.tokens[:, : self.prompt_tokens].to(self.student.device),
            length - self.prompt_tokens,
            seed=seed_of(self.seed, step, rank),
            temperature=self.temperature,
        )
        stop = self.student.config.eos_token_id
        learned = until_stop(written, self.prompt_tokens, stop if isinstance(stop, int) else None)
        return Batch.of(written.cpu(), learned.cpu())
