"""Feature distillation: the student's hidden states learn to tell what the teacher's say.

Romero et al. 2014, "FitNets"; Jiao et al. 2019, "TinyBERT" (a projector per layer, layers evenly mapped).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from alight_converters.training.data import Batch
from alight_converters.training.objective import Objective
from alight_converters.training.teacher import LiveTeacher, student_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

import torch


class FeatureObjective(Objective):
    """The divergence of the logits and, times `weight`, the distance of the hidden states.

    Each student layer answers to one teacher layer, through a projector of its own that is thrown away
    afterwards. Both sides are scaled to unit mean square per token: language models have a few dimensions
    that are a thousand times larger than the others and would be all that counts.
    """

    def __init__(self, student: PreTrainedModel, teacher: LiveTeacher, weight: float) -> None:
        super().__init__(student, teacher)
        self.live = teacher
        self.weight = weight
        ours, theirs = (m.config.get_text_config() for m in (student, teacher.model.model))
        self.pairs = even_pairs(ours.num_hidden_layers, theirs.num_hidden_layers)
        # It begins as the identity: in a pruned student, the dimensions that are left keep their meaning.
        identity = torch.eye(theirs.hidden_size, ours.hidden_size, device=student.device)
        self.projectors = nn.ParameterList(nn.Parameter(identity.clone()) for _ in self.pairs)

    def forward(self, batch: Batch) -> Tensor:
        hidden, ours = self.split.layers(batch.tokens)
        with torch.no_grad():
            teacher_hidden, theirs = self.live.model.layers(batch.tokens)
        loss = student_loss(self.split, hidden, batch, self.live.from_hidden(teacher_hidden, batch))
        return loss + self.weight * self._distance(ours, theirs, batch)

    def _distance(self, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Sum over the predicted positions, mean over layers and dimensions."""
        distances = []
        for (s, t), projector in zip(self.pairs, self.projectors, strict=True):
            guess = F.linear(_unit(ours[s])[:, :-1][batch.predicting], projector)
            truth = _unit(theirs[t])[:, :-1][batch.predicting]
            distances.append((guess.float() - truth).square().mean(-1).sum())
        return torch.stack(distances).mean()


def even_pairs(students: int, teachers: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer), counted from 1, evenly spread; the last answers to the last."""
    return [(s, max(1, round(s * teachers / students))) for s in range(1, students + 1)]


def _unit(hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden.float(), hidden.shape[-1:])
