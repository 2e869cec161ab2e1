"""Run a recipe: its stages, then each export, measured against the source, into the store."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from alight import api, devices
from alight.artifact import Artifact
from alight.blobs import disk_full_is_ours
from alight.builder import BuildRequest, BuildResult, loose_folder
from alight.builder import Progress as BuildProgress
from alight.devices import Device
from alight.errors import BadInput
from alight_converters.build_weights import Weights
from alight_converters.build_workspace import workspace
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.exports import Exports, Input, names_of
from alight_converters.passes import Progress, silent
from alight_converters.recipe import Recipe
from alight_converters.recipe_stages import Stage, calibration_key, calibration_rows, outside, run_stage
from alight_converters.training.world import World


def run(
    recipe: Recipe,
    *,
    target: Device | None = None,
    folder: Path | None = None,
    progress: BuildProgress | None = None,
) -> BuildResult:
    """Run a recipe.

    Args:
        target: what the artifacts are for; None takes the recipe's own.
        folder: where to write the artifacts as plain folders, too.

    Raises:
        AlightError: what is wrong, the value, and what to do next; finished stages are kept.
    """
    if folder is not None and folder.exists():
        raise BadInput(f"{folder} exists already", hint="Give a new folder.")
    check_compute(recipe.device)
    world = World.join(recipe.device)
    progress = progress if world.is_first else None
    opened = world.by_first(lambda: Opened.of(recipe, target, progress))
    with workspace(opened.artifact.size) as work, disk_full_is_ours(work):
        return _Run(recipe, opened, work, progress or silent, world).result(folder)


@dataclass
class Opened:
    """What a recipe stands on, checked before any work."""

    recipe: Recipe
    artifact: Artifact
    device: Device

    @classmethod
    def of(cls, recipe: Recipe, target: Device | None, progress: BuildProgress | None = None) -> Opened:
        """
        Raises:
            BadInput: two exports of the same name; a file that a pass reads does not exist.
        """
        check_files(recipe)
        _ = names_of(recipe.name, recipe.export)
        artifact = loose_folder(Path(recipe.source)) or api.resolve(recipe.source, progress=progress)
        return cls(recipe, artifact, target or devices.resolve(recipe.target))

    def request(self) -> BuildRequest:
        """The part of a recipe that measuring and choosing need."""
        recipe = self.recipe
        text = recipe.evaluate.text
        return BuildRequest(
            source=self.artifact,
            device=self.device,
            name=recipe.name,
            context=recipe.context,
            streams=recipe.streams,
            max_kl=recipe.max_kl,
            text=_read(text) if text else None,
            tokens=recipe.evaluate.tokens,
            seed=recipe.seed,
        )


def check_compute(device: str) -> None:
    """Raises BadInput where passes are to compute on a GPU that is not here."""
    if device == "cpu":
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device.partition(":")[2] or 0) >= count:
        raise BadInput(
            f"device: {device!r}, but torch {torch.__version__} sees {count} CUDA devices",
            hint="Set `device: cpu`, or run it on a machine with a GPU and a CUDA build of torch.",
        )


def check_files(recipe: Recipe) -> None:
    """Raises BadInput where a file does not exist that a later stage would ask for in hours."""
    named = {"calibration.text": recipe.calibration.text, "evaluate.text": recipe.evaluate.text}
    for number, pass_ in enumerate(recipe.passes):
        named |= {f"passes[{number}].{setting}": path for setting, path in outside(pass_).items()}
    for where, path in named.items():
        if isinstance(path, Path) and not path.exists():
            raise BadInput(f"{where}: {path} does not exist", hint="Paths are relative to the recipe.")


class _Run:
    """One run of a recipe; steps in the order of `result`."""

    def __init__(self, recipe: Recipe, opened: Opened, work: Path, progress: Progress, world: World) -> None:
        self.recipe = recipe
        self.world = world
        self.artifact = opened.artifact
        self.device = opened.device
        self.request = opened.request()
        self.work = work
        self.progress = progress
        (work / "source").mkdir()
        (work / "result").mkdir()
        self.source = Weights(opened.artifact, work / "source")

    def result(self, folder: Path | None) -> BuildResult:
        """Of several processes, all take part in the stages, and the first one exports and measures."""
        checkpoint, digest, stages = self._stages()
        return self.world.by_first(lambda: self._artifacts(checkpoint, digest, stages, folder))

    def _artifacts(
        self, checkpoint: Checkpoint | None, digest: str, stages: list[Stage], folder: Path | None
    ) -> BuildResult:
        origin = self.artifact if checkpoint is None else checkpoint
        made_from = Input(
            Weights(origin, self.work / "result"),
            digest,
            calibration=lambda: self._calibration,
            calibration_key=self._calibration_key,
            device=self.recipe.device,
            seed=self.recipe.seed,
        )
        return Exports(self.request, self.source, made_from, self.work, self.progress).build(
            self.recipe.export,
            names_of(self.recipe.name, self.recipe.export),
            settings=self.recipe.model_dump(mode="json", by_alias=True),
            stages=[s.to_json() for s in stages],
            folder=folder,
        )

    def _stages(self) -> tuple[Checkpoint | None, str, list[Stage]]:
        """The checkpoint after all passes and its digest; None where there are none, and the source goes on."""
        if not self.recipe.passes:
            return None, self.source.digest, []
        self.world.by_first(
            lambda: self.source.checkpoint.folder
        )  # a GGUF is rewritten once, the others find it
        source = self.source.checkpoint
        source.check()  # what is not finite is told here, not as a loss that is not
        checkpoint, digest, stages = source, source.digest, []
        for number, pass_ in enumerate(self.recipe.passes):
            checkpoint, stage = run_stage(
                number,
                pass_,
                checkpoint,
                digest,
                recipe=self.recipe,
                source=source,
                calibration=lambda: self._calibration,
                progress=self.progress,
            )
            digest = stage.digest
            stages.append(stage)
        return checkpoint, digest, stages

    @cached_property
    def _calibration(self) -> Calibration:
        recipe = self.recipe
        return calibration_rows(
            recipe.calibration, recipe.seed, self.source.checkpoint, recipe.device, self.progress
        )

    def _calibration_key(self) -> str:
        recipe = self.recipe
        return calibration_key(recipe.calibration, recipe.seed, self.source.checkpoint)


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"evaluate.text: cannot read {text}: {error}", hint="Give a plain text file."
        ) from error
