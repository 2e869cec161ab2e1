"""Run a recipe: its stages, then each export, measured against the source, into the store."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from alight import api, devices, planner
from alight.artifact import Artifact
from alight.blobs import disk_full_is_ours
from alight.builder import BuildRequest, BuildResult, Candidate, loose_folder
from alight.builder import Progress as BuildProgress
from alight.devices import Device
from alight.errors import BadInput
from alight.gguf import read_header
from alight_converters import report
from alight_converters.build import keep, write_folder
from alight_converters.build_measure import Judge
from alight_converters.build_weights import Weights
from alight_converters.build_workspace import workspace
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Progress, silent
from alight_converters.recipe import Recipe
from alight_converters.recipe_export import Export, ExportContext
from alight_converters.recipe_stages import Stage, calibration_key, calibration_rows, outside, run_stage
from alight_converters.search import choose, pareto


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
    opened = Opened.of(recipe, target, progress)
    with workspace(opened.artifact.size) as work, disk_full_is_ours(work):
        return _Run(recipe, opened, work, progress or silent).result(folder)


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
        _ = names_of(recipe)
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
        if path is not None and not path.exists():
            raise BadInput(f"{where}: {path} does not exist", hint="Paths are relative to the recipe.")


def names_of(recipe: Recipe) -> list[str]:
    """The name in the store of each export."""
    names = []
    for export in recipe.export:
        alone = recipe.name if len(recipe.export) == 1 else ""
        tag = export.label.lower().replace("+", "-")
        names.append(export.name or alone or f"{recipe.name.rpartition(':')[0]}:{tag}")
    if twice := {n for n in names if names.count(n) > 1}:
        raise BadInput(
            f"two exports are named {', '.join(sorted(twice))}", hint="Give each a name of its own."
        )
    return names


class _Run:
    """One run of a recipe; steps in the order of `result`."""

    def __init__(self, recipe: Recipe, opened: Opened, work: Path, progress: Progress) -> None:
        self.recipe = recipe
        self.artifact = opened.artifact
        self.device = opened.device
        self.request = opened.request()
        self.work = work
        self.progress = progress
        (work / "source").mkdir()
        (work / "result").mkdir()
        self.source = Weights(opened.artifact, work / "source")

    def result(self, folder: Path | None) -> BuildResult:
        checkpoint, digest, stages = self._stages()
        origin = self.artifact if checkpoint is None else checkpoint
        weights = Weights(origin, self.work / "result")
        judge = Judge(self.source, self.request, self.progress)
        made = [self._export(judge, e, weights, digest) for e in self.recipe.export]
        candidates = [judge.settle(m.candidate, m.made_of) for m in made]
        chosen, reason = choose(candidates, self.request)
        front = pareto(candidates, self.request)

        kept = []
        for name, export, candidate in zip(names_of(self.recipe), made, candidates, strict=True):
            why = reason if candidate is chosen else f"one of the recipe's {len(made)} exports"
            data = report.of_recipe(
                self.artifact,
                self.device,
                self.recipe.model_dump(mode="json", by_alias=True),
                [s.to_json() for s in (*stages, *(m.stage for m in made if m.stage))],
                report.results(candidates, front, candidate, why),
                weights=self.source.digest,
                note=judge.reference_note(),
                samples=report.samples(
                    judge.source_answers(), judge.answers(export.made_of, partial(_the, export.file))
                ),
                limits=report.limits(self.request),
            )
            kept.append(keep(name, export.file, data, self.work, source=self.artifact))
            if folder is not None:
                write_folder(kept[-1], folder if len(made) == 1 else folder / name.replace(":", "-"))
        best = kept[candidates.index(chosen)]
        return BuildResult(best, tuple(candidates), chosen, reason, front, tuple(kept))

    def _stages(self) -> tuple[Checkpoint | None, str, list[Stage]]:
        """The checkpoint after all passes and its digest; None where there are none, and the source goes on."""
        if not self.recipe.passes:
            return None, self.source.digest, []
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

    def _export(self, judge: Judge, export: Export, weights: Weights, digest: str) -> _Made:
        context = ExportContext(
            folder=self.work / "result",
            weights=weights,
            calibration=lambda: self._calibration,
            device=self.recipe.device,
            seed=self.recipe.seed,
            progress=self.progress,
        )
        file = export.run(context)
        made_of = {
            "weights": digest,
            "export": export.model_dump(mode="json", exclude={"name"}),
            "calibration": self._calibration_key() if export.calibrated else None,
        }
        prediction = planner.predict(
            planner.shape_of_gguf([read_header(file)]),
            self.device,
            quantization=export.label,
            context=self.recipe.context,
            streams=self.recipe.streams,
        )
        candidate = judge.measure(prediction, made_of, partial(_the, file))
        stage = None
        if context.measured:
            stage = Stage(
                kind=f"export {export.label}",
                settings=export.model_dump(mode="json"),
                digest="",
                seconds=0.0,
                parameters=planner.shape_of_gguf([read_header(file)]).parameters,
                bytes=file.stat().st_size,
                measured=context.measured,
            )
        return _Made(file, made_of, candidate, stage)

    def _calibration_key(self) -> str:
        recipe = self.recipe
        return calibration_key(recipe.calibration, recipe.seed, self.source.checkpoint)


@dataclass(frozen=True)
class _Made:
    """An export that was written and measured; a stage of its own in the report where it measured something."""

    file: Path
    made_of: dict[str, Any]
    candidate: Candidate
    stage: Stage | None


def _the(file: Path) -> Path:
    return file


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"evaluate.text: cannot read {text}: {error}", hint="Give a plain text file."
        ) from error
