"""Models with what real large ones have: a few channels whose activations are far larger than the others'."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from alight_converters.checkpoint import Checkpoint


def with_outliers(checkpoint: Checkpoint, folder: Path, factor: float = 30.0) -> Checkpoint:
    """Norms of the layers enlarge three channels by `factor`. (Weights stay: another function.)"""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint.tensors():
            if name.startswith("model.layers.") and "layernorm" in name:
                tensor = tensor.clone()
                tensor[[3, 17, 40]] *= factor
            yield name, tensor

    return checkpoint.with_tensors(tensors(), folder)
