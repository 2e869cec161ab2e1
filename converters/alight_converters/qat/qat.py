"""Quantization-aware training: weights learn while they are rounded to the grid of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from alight.errors import Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Context, Pass
from alight_converters.qat.grids import GRIDS, Grid, Rounding, fits
from alight_converters.training.config import Training
from alight_converters.training.data import Batch, Shuffled
from alight_converters.training.head import SplitModel
from alight_converters.training.losses import Divergence
from alight_converters.training.objective import Objective
from alight_converters.training.state import identity
from alight_converters.training.teacher import LiveTeacher, require_same_tokenizer
from alight_converters.training.trainer import train
from alight_converters.training.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QAT(Pass):
    """Train with weights rounded to a grid, so that quantizing to that grid afterwards changes nothing.

    Every matrix of the decoder is what the artifact will hold; gradients pass through the rounding as if it
    were not there (the straight-through estimator, Bengio et al. 2013). The loss is the KL divergence from
    the source, so that what is kept is the model, not the calibration text (Liu et al. 2023, LLM-QAT).

    The result is float32, since float16 and bfloat16 cannot hold all values of a grid. Quantize it to the
    type it was trained for, without an importance matrix: that would choose other scales.

    Attributes:
        grid: q4_0 and q8_0 of GGUF, q4f16_1 and q4f32_1 of MLC, onnx_int4 of ONNX Runtime's MatMulNBits.
        teacher: a checkpoint folder. None: the checkpoint that the recipe began with.
    """

    in_all_processes: ClassVar[bool] = True

    kind: Literal["qat"] = "qat"
    grid: Literal["q4_0", "q8_0", "q4f16_1", "q4f32_1", "onnx_int4"] = "q4_0"
    teacher: Path | None = None
    training: Training = Training(learning_rate=1e-4)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        world = World.join(context.device)
        teacher = Checkpoint.open(self.teacher) if self.teacher else context.source
        require_same_tokenizer(checkpoint, teacher)

        model = checkpoint.load(torch.float32, world.device)
        context.measured["kept_in_float"] = attach(model, GRIDS[self.grid])
        compute = torch.bfloat16 if self.training.precision == "bf16" else torch.float32
        frozen = teacher.load(compute, world.device).requires_grad_(False)
        objective = Objective(model, LiveTeacher(SplitModel(frozen), Divergence("forward_kl")))
        batches = Shuffled(Batch.of(context.calibration.rows), context.seed)

        inputs = checkpoint.digest, teacher.digest, context.calibration.digest, str(context.seed)
        run = identity(self.model_dump_json(), *inputs)
        train(objective, batches, self.training, context, world, name="qat", run=run)
        merge(model)
        if world.is_first:
            checkpoint.with_model(model, context.folder, dtype=torch.float32)
        world.wait()
        return Checkpoint.open(context.folder)


def attach(model: PreTrainedModel, grid: Grid) -> list[str]:
    """Round the model's matrices whenever they are used; the weights behind them stay in float32.

    Returns:
        Names of the matrices whose rows do not divide into blocks: they stay in float, here and in artifacts.
    """
    left = []
    for name, module, rounding in _matrices(model, grid):
        weight: Any = module.weight
        if fits(weight):
            parametrize.register_parametrization(module, "weight", FakeQuantize(rounding))
        else:
            left.append(f"{name}.weight")
    return left


def merge(model: PreTrainedModel) -> None:
    """Replace the weights by their rounded selves."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _matrices(model: PreTrainedModel, grid: Grid) -> list[tuple[str, nn.Module, Rounding]]:
    """What an artifact quantizes: linear layers, embedding and head. Tied ones are rounded alike."""
    whole: Any = model
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    tied = bool(model.config.tie_word_embeddings)
    found: list[tuple[str, nn.Module, Rounding]] = []
    for name, module in model.named_modules():
        if module is head or (module is embedding and tied):
            found.append((name, module, grid.head))
        elif module is embedding or isinstance(module, nn.Linear):
            found.append((name, module, grid.linear))
        elif any(p.dim() > 2 for p in module.parameters(recurse=False)):
            raise Unsupported(
                f"{name} holds its experts in one tensor: QAT does not round those yet",
                hint="Quantize mixture-of-experts models after training.",
            )
    return found


class FakeQuantize(nn.Module):
    """A weight as the artifact will hold it."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, weight: Tensor) -> Tensor:
        rounded: Tensor = _StraightThrough.apply(weight, self.rounding)  # type: ignore[no-untyped-call]
        return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, weight: Tensor, rounding: Rounding) -> Tensor:
        return rounding(weight)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
