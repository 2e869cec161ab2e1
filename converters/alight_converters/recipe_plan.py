"""What a recipe would do: which stages are done already, and what the others will take. Estimates, from sizes."""

from __future__ import annotations

from alight import devices
from alight.builder import PlannedStage, RecipePlan
from alight.devices import Device
from alight_converters.build_weights import Weights
from alight_converters.build_workspace import workspace
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Pass
from alight_converters.recipe import Recipe
from alight_converters.recipe_run import Opened
from alight_converters.recipe_stages import StageKey
from alight_converters.training.config import Training

FLOAT = 4  # bytes of a weight while passes compute
# A training step is a forward and a backward pass of the student, and a forward pass of the teacher: 6 + 2 flops for
# each weight and token. In memory: weights, gradients and two moments of Adam, and the teacher.
_TRAIN_FLOPS, _TRAIN_COPIES = 8, 5
_SHARE = 0.5  # of the peak float32 speed that torch reaches on matrices of this size
# On a GPU: what one H100 did with a model of 135 M parameters, 91,000 tokens/s of distillation and 73,600 of QAT
# (docs/benchmarks.md), in flops per second counted as above.
_H100_USUAL = _TRAIN_FLOPS * 135e6 * 91_000
_H100_FLOPS = {"qat": _TRAIN_FLOPS * 135e6 * 73_600}
_WRITE = 200e6  # bytes/s at which checkpoints are read and written
_RUNTIME = 600_000_000  # torch and transformers


def plan(recipe: Recipe, *, target: Device | None = None) -> RecipePlan:
    """Nothing is run, but for opening the source: a GGUF is read as a checkpoint, once."""
    opened = Opened.of(recipe, target)
    with workspace(0) as folder:
        weights = Weights(opened.artifact, folder)
        shape = weights.shape
        stages: list[PlannedStage] = []
        if recipe.passes:
            stages, after = _stages(recipe, weights.checkpoint)
            # Passes change the shape, and nobody knows how before they ran: until then it is the source's.
            shape = Weights(after, folder).shape if after else shape
    found = [(e, e.predict(shape, opened.device, recipe.context, recipe.streams)) for e in recipe.export]
    exports = tuple(prediction for _, prediction in found if prediction is not None)
    unpredicted = tuple(export.label for export, prediction in found if prediction is None)
    return RecipePlan(recipe.name, opened.device, tuple(stages), exports, unpredicted)


def _stages(recipe: Recipe, source: Checkpoint) -> tuple[list[PlannedStage], Checkpoint | None]:
    """The stages, and the checkpoint after the last one where it is known already."""
    machine = devices.probe()
    digest: str | None = source.digest
    known = source  # the last checkpoint that is there: what comes after it is taken to be as large
    planned: list[PlannedStage] = []
    after: Checkpoint | None = None
    for number, pass_ in enumerate(recipe.passes, 1):
        name = f"{number}. {pass_.kind}"
        key = StageKey.of(pass_, digest, recipe, source) if digest else None
        done = key.done() if key else None
        if key and done:
            digest = done.digest
            known = after = Checkpoint.open(key.checkpoint)
            planned.append(PlannedStage(name, True, done.seconds, 0))
            continue
        digest = after = None  # what comes after a stage that did not run cannot be kept from before
        on_cpu = recipe.device == "cpu"
        speed = machine.flops * _SHARE if on_cpu else _H100_FLOPS.get(pass_.kind, _H100_USUAL)
        seconds = _seconds(pass_, recipe, known, speed)
        memory = _memory(pass_, known.parameters)
        planned.append(PlannedStage(name, False, seconds, memory, "" if on_cpu else "one H100"))
    return planned, after


def _training(pass_: Pass) -> Training | None:
    found = getattr(pass_, "training", None)
    return found if isinstance(found, Training) else None


def _seconds(pass_: Pass, recipe: Recipe, checkpoint: Checkpoint, speed: float) -> float:
    """Of a training pass by its steps; of any other by what it says itself. `speed` is in flops per second."""
    training = _training(pass_)
    parameters, length = checkpoint.parameters, recipe.calibration.length
    if training:
        flops = float(_TRAIN_FLOPS) * parameters * training.steps * training.batch * length
    else:
        flops = pass_.flops(checkpoint, recipe.calibration.rows * length)
    return flops / speed + 3 * FLOAT * parameters / _WRITE


def _memory(pass_: Pass, parameters: int) -> int:
    return _RUNTIME + FLOAT * parameters * (_TRAIN_COPIES if _training(pass_) else 2)
