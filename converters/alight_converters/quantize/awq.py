"""AWQ: scale up the weight columns that matter before they are rounded.

Lin et al. 2024, "Activation-aware Weight Quantization", arXiv 2306.00978. A column whose inputs are large
costs most when it is rounded; multiplied by s > 1 it is rounded s times finer (its block's step hardly
grows), and the division by s goes into what writes the input. Any format gains from it afterwards.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from alight.errors import Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Context, Pass
from alight_converters.quantize.activations import observe
from alight_converters.quantize.folding import Group, fold, groups

_SAMPLE = 512  # tokens that the error is measured on
_SMALLEST = 1e-4


class Awq(Pass):
    """Fold s = mean|x|^strength into the checkpoint, with the strength that is best for each group of matrices.

    Strengths from 0 (nothing changes) to 1 are tried; the best one has the least squared error of the
    matrices' outputs on calibration tokens, after rounding to `bits` in blocks of `block` columns. The model
    computes the same as before.
    """

    kind: Literal["awq"] = "awq"
    bits: int = Field(default=4, ge=2, le=8)
    block: int = Field(default=32, ge=8)
    steps: int = Field(default=20, ge=1)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        model: Any = checkpoint.load(device=context.device)
        places = groups(checkpoint)
        self._check_widths(checkpoint, places)
        means, samples = _inputs(model, places, context)
        scales, before, after = {}, 0.0, 0.0
        strengths = []
        for number, group in enumerate(places):
            weights = [model.get_submodule(reader).weight.detach().float() for reader in group.readers]
            scale, strength, errors = self._best(group, weights, means[group], samples.pop(group))
            scales[group] = scale.cpu()
            strengths.append(strength)
            # Relative errors are summed: places differ by magnitudes in the size of their outputs.
            before, after = before + errors[0], after + min(errors)
            context.progress("awq", number + 1, len(places))
        context.measured["relative_output_error"] = {
            "before": before / len(places),
            "after": after / len(places),
        }
        context.measured["mean_strength"] = sum(strengths) / len(strengths)
        return fold(checkpoint, scales, context.folder)

    def _check_widths(self, checkpoint: Checkpoint, places: list[Group]) -> None:
        for group in places:
            columns = group.width * group.repeats
            if columns % self.block:
                raise Unsupported(
                    f"{group.readers[0]} has {columns} columns, no multiple of block = {self.block}",
                    hint="Choose a block that divides the widths of the model.",
                )

    def _best(
        self, group: Group, weights: list[torch.Tensor], mean: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, float, list[float]]:
        """The best scales, shape (width,), their strength, and the relative error at each strength tried."""
        size = sum(float((w @ sample.T).square().sum()) for w in weights)
        errors, tried = [], []
        for step in range(self.steps + 1):
            scale = mean.clamp(_SMALLEST) ** (step / self.steps)
            scale = scale / (scale.max() * scale.min()).sqrt()
            columns = group.spread(scale)
            error = 0.0
            for weight in weights:
                change = self._rounded(weight * columns) / columns - weight
                error += float((change @ sample.T).square().sum())
            errors.append(error / max(size, 1e-30))
            tried.append(scale)
        best = errors.index(min(errors))
        return tried[best], best / self.steps, errors

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Symmetric round-to-nearest in blocks. The value of largest magnitude is exact, as in GGUF's Q4_0."""
        blocks = weight.view(len(weight), -1, self.block)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        half = 1 << (self.bits - 1)
        step = largest / -half
        step = torch.where(step == 0, 1.0, step)
        return ((blocks / step).round().clamp(-half, half - 1) * step).view_as(weight)


def _inputs(
    model: Any, places: list[Group], context: Context
) -> tuple[dict[Group, torch.Tensor], dict[Group, torch.Tensor]]:
    """Mean |x| of each group's input, shape (width,), and about _SAMPLE of the inputs, (tokens, columns)."""
    rows = context.calibration.rows
    generator = torch.Generator().manual_seed(context.seed)
    per_row = max(1, min(rows.shape[1], _SAMPLE // len(rows)))
    chosen = torch.randperm(rows.shape[1], generator=generator)[:per_row].to(model.device)
    sums: dict[Group, torch.Tensor] = {}
    samples: dict[Group, list[torch.Tensor]] = {group: [] for group in places}

    def see(group: Group, inputs: torch.Tensor) -> None:
        here = inputs.abs().float().mean(0)
        sums[group] = sums[group] + here if group in sums else here
        if len(samples[group]) * per_row < _SAMPLE:
            samples[group].append(inputs[chosen].float())

    observe(model, {g.readers[0]: g for g in places}, see, context.calibration, progress=context.progress)
    means = {group: group.gather(total / len(rows)) for group, total in sums.items()}
    return means, {group: torch.cat(parts) for group, parts in samples.items()}
