"""LoRA: train a low-rank change of each linear layer, and add it to the weight at the end.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRA(BaseModel):
    """Attributes:
    rank: of the change. alpha: it is scaled by alpha / rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)

    def attach(self, model: PreTrainedModel) -> None:
        """Freeze the model and put an adapter on each linear layer of its decoder."""
        model.requires_grad_(False)
        for layer in _linears(model):
            parametrize.register_parametrization(layer, "weight", _Change(layer.weight, self))

    @staticmethod
    def merge(model: PreTrainedModel) -> None:
        """Add the changes to the weights and remove the adapters."""
        for layer in _linears(model):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


class _Change(nn.Module):
    """weight + alpha / rank * up @ down. `up` starts at zero, so the model starts as it was."""

    def __init__(self, weight: Tensor, lora: LoRA) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.empty(lora.rank, columns, device=weight.device))
        self.up = nn.Parameter(torch.zeros(rows, lora.rank, device=weight.device))
        self.scale = lora.alpha / lora.rank
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def _linears(model: PreTrainedModel) -> list[nn.Linear]:
    return [module for module in model.base_model.modules() if isinstance(module, nn.Linear)]
