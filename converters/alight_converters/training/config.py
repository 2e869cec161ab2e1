"""What a user can say about training."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Training(BaseModel):
    """How a pass trains. AdamW; the learning rate rises linearly, then falls to zero as a cosine.

    Attributes:
        steps: updates of the weights.
        batch: rows per step, over all processes.
        rows_at_once: rows in memory at a time; gradients are accumulated up to `batch`. None: as many as fit.
        learning_rate: the highest one.
        warmup: the share of the steps in which it rises.
        max_norm: gradients are scaled down to this norm.
        precision: "bf16" computes in bfloat16 under autocast. Weights and optimizer are float32 always.
        gradient_checkpointing: compute activations twice instead of keeping them.
        compile: run the decoder through `torch.compile`.
        save_every: steps between two saved states, to resume from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=64, ge=1)
    rows_at_once: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    max_norm: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "float32"] = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    save_every: int = Field(default=200, ge=1)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = math.ceil(self.steps * self.warmup)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (self.steps - rising)))
