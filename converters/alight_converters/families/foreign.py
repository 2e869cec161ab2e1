"""Checkpoints that are one of our families in another dress: they are rewritten when they are opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alight_converters.families.family import Config

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Foreign:
    """How to read a model type that needs code from its own folder, or has parts that are no language model.

    Attributes:
        model_type: what its `config.json` says.
        config: its config -> the config of a family of ours.
        tensors: (name, tensor, its config) -> the tensors of ours; none for one that is left out.
    """

    model_type: str
    config: Callable[[Config], dict[str, Any]]
    tensors: Callable[[str, torch.Tensor, Config], list[tuple[str, torch.Tensor]]]
