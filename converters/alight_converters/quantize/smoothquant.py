"""SmoothQuant: move outliers of the activations into the weights, where they hurt less.

Xiao et al. 2023, arXiv 2211.10438. For runtimes that compute in 8-bit integers (W8A8): activations are
rounded too, and a few channels a hundred times as large as the others would take all of the range.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Context, Pass
from alight_converters.quantize.activations import observe
from alight_converters.quantize.folding import Group, fold, groups

_SMALLEST = 1e-5


class SmoothQuant(Pass):
    """Divide the input of attention and feed-forward network by max|x|^strength / max|w|^(1 - strength).

    The model computes the same as before. `strength` 0.5 splits the difficulty evenly; models with stronger
    outliers want up to 0.9 (section 5 of the paper).
    """

    kind: Literal["smoothquant"] = "smoothquant"
    strength: float = Field(default=0.5, ge=0.0, le=1.0)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        model: Any = checkpoint.load(device=context.device)
        places = groups(checkpoint, norms_only=True)
        largest: dict[Group, torch.Tensor] = {}

        def see(group: Group, inputs: torch.Tensor) -> None:
            here = inputs.abs().amax(0).float()
            largest[group] = torch.maximum(largest[group], here) if group in largest else here

        observe(model, {g.readers[0]: g for g in places}, see, context.calibration, progress=context.progress)
        scales = {}
        for group, inputs in largest.items():
            matrices = [model.get_submodule(reader).weight.detach() for reader in group.readers]
            weights = torch.stack([m.abs().amax(0) for m in matrices]).amax(0).float()
            scale = inputs.clamp(_SMALLEST) ** self.strength / weights.clamp(_SMALLEST) ** (1 - self.strength)
            scales[group] = scale.clamp(_SMALLEST).cpu()
        context.measured["outliers"] = {
            "before": _worst({g: x.cpu() for g, x in largest.items()}),
            "after": _worst({g: x.cpu() / scales[g] for g, x in largest.items()}),
        }
        return fold(checkpoint, scales, context.folder)


def _worst(largest: dict[Group, torch.Tensor]) -> float:
    """The largest input of a channel against the median channel's, in the worst place of the model."""
    return max(float(x.max() / x.median().clamp(_SMALLEST)) for x in largest.values())
