"""What training minimizes: a student's loss on a batch, as one module, so that DDP sees all that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from alight_converters.training.data import Batch
from alight_converters.training.head import SplitModel
from alight_converters.training.teacher import Teacher, student_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(nn.Module):
    """Sum of the losses of a batch's predicted tokens.

    Args:
        student: its trainable weights are what is trained.
    """

    def __init__(self, student: PreTrainedModel, teacher: Teacher) -> None:
        super().__init__()
        self.student = student
        self.split = SplitModel(student)
        self.teacher = teacher

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.split.hidden(batch.tokens)
        return student_loss(self.split, hidden, batch, self.teacher.loss_of(batch))
