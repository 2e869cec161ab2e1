"""The stages of a recipe, each run once: a pass's output is kept under the digest of all that decides it.

$ALIGHT_HOME/cache/build/stages/<key>/
    checkpoint/   what the pass wrote
    work/         what an interrupted pass resumes from; gone when it is done
    stage.json    written last: the stage is done
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel

import alight
from alight import plugins
from alight.blobs import disk_full_is_ours
from alight.errors import AlightError
from alight_converters.build_workspace import cache, digest_of_path, key_of, read_json, write_json
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.documents import local
from alight_converters.memory import out_of_memory_is
from alight_converters.passes import Context, Pass, Progress
from alight_converters.recipe import CalibrationText, Recipe
from alight_converters.training.world import World


@dataclass(frozen=True, slots=True)
class Stage:
    """A pass that ran, in this build or before.

    Attributes:
        settings: of the pass, with every default.
        digest: of the checkpoint it wrote.
        seconds: it took, when it ran.
        measured: by the pass, for the report.
    """

    kind: str
    settings: dict[str, Any]
    digest: str
    seconds: float
    parameters: int
    bytes: int
    measured: dict[str, Any]
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StageKey:
    """Where a stage's output is kept."""

    folder: Path

    @classmethod
    def of(cls, pass_: Pass, before: str, recipe: Recipe, source: Checkpoint) -> StageKey:
        """Of a pass after the checkpoint whose digest is `before`."""
        key = key_of(
            input=before,
            settings=pass_.model_dump(mode="json"),
            files={name: digest_of_path(path) for name, path in outside(pass_).items()},
            source=source.digest,
            calibration=calibration_key(recipe.calibration, recipe.seed, source),
            seed=recipe.seed,
            version=plugins.version(plugins.PASSES, pass_.kind) or f"alight {alight.__version__}",
        )
        return cls(cache() / "stages" / key)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def done(self) -> Stage | None:
        """What the stage did; None where it did not finish."""
        known = read_json(self.folder / "stage.json")
        return Stage(**known, cached=True) if known and self.checkpoint.is_dir() else None

    def begin(self) -> Stage | None:
        """What the stage did before. Where it did not finish, what a killed run left goes, but for what the pass
        resumes from."""
        if stage := self.done():
            return stage
        for left in self.folder.iterdir():
            if left.is_dir() and left != self.work:
                shutil.rmtree(left, ignore_errors=True)
        self.work.mkdir(exist_ok=True)
        return None

    def finish(self, stage: Stage) -> None:
        write_json(self.folder / "stage.json", {k: v for k, v in stage.to_json().items() if k != "cached"})
        shutil.rmtree(self.work, ignore_errors=True)


def run_stage(
    number: int,
    pass_: Pass,
    before: Checkpoint,
    digest: str,
    *,
    recipe: Recipe,
    source: Checkpoint,
    calibration: Callable[[], Calibration],
    progress: Progress,
) -> tuple[Checkpoint, Stage]:
    """The checkpoint after a pass, run now or kept from before.

    Args:
        number: of the pass in the recipe, from 0. digest: of the checkpoint `before`.

    Raises:
        AlightError: what the pass raises, with its place in the recipe before it.
    """
    world = World.join(recipe.device)
    key = StageKey.of(pass_, digest, recipe, source)

    def run() -> Stage:
        context = Context(
            folder=key.checkpoint,
            work=key.work,
            source=source,
            calibration=calibration(),
            device=recipe.device,
            seed=recipe.seed,
            progress=progress,
        )
        started = time.monotonic()
        length = recipe.calibration.length
        too_large = out_of_memory_is(
            f"the pass, on {recipe.device} with rows of {length} tokens,",
            f"Try calibration.length {length // 2}, or a device with more memory.",
        )
        with _told_as(f"passes[{number}] ({pass_.kind})"), too_large:
            made = pass_.run(before, context)
        return Stage(
            kind=pass_.kind,
            settings=pass_.model_dump(mode="json"),
            digest=made.digest,
            seconds=time.monotonic() - started,
            parameters=made.parameters,
            bytes=made.bytes,
            measured=context.measured,
        )

    with disk_full_is_ours(key.folder), _held(key, world):
        stage = world.by_first(key.begin)
        if stage is None:
            if pass_.in_all_processes:
                world.by_first(lambda: calibration().digest)  # sampled once: the others find what is kept
                stage = run()
            else:
                stage = world.by_first(run)
            world.by_first(partial(key.finish, stage))
    return Checkpoint.open(key.checkpoint), stage


@contextmanager
def _held(key: StageKey, world: World) -> Iterator[None]:
    """A stage to ourselves: another build may be at the same one. The first of several processes holds it for all."""
    if not world.is_first:
        yield
        return
    key.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(key.folder / "lock"):
        yield


@contextmanager
def _told_as(place: str) -> Iterator[None]:
    """Errors of a pass begin with its place in the recipe."""
    try:
        yield
    except AlightError as error:
        error.message = f"{place}: {error.message}"
        raise


# -- calibration -------------------------------------------------------------------------------------


def calibration_key(wanted: CalibrationText, seed: int, source: Checkpoint) -> str:
    """What decides the rows, without making them."""
    return key_of(
        text=digest_of_path(local(wanted.text)) if wanted.text else None,
        seed=None if wanted.text else seed,
        rows=wanted.rows,
        length=wanted.length,
        source=source.digest,
    )


def calibration_rows(
    wanted: CalibrationText, seed: int, source: Checkpoint, device: str, progress: Progress
) -> Calibration:
    """The rows of a recipe. Sampled ones are kept: they take minutes.

    Raises:
        BadInput: the text is too short, with the numbers.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from alight_converters.quantize.files import appearing

    if wanted.text:
        return Calibration.of_file(local(wanted.text), source.tokenizer(), wanted.rows, wanted.length)
    file = cache() / "calibration" / f"{calibration_key(wanted, seed, source)}.safetensors"
    origin = f"sampled from the source, seed {seed}"
    if file.exists():
        return Calibration(load_file(file)["rows"].to(torch.int64), origin)
    made = Calibration.sampled(source, wanted.rows, wanted.length, seed, device, progress)
    with appearing(file) as part:
        save_file({"rows": made.rows.contiguous()}, part)
    return Calibration(made.rows, origin)


# -- files beside a recipe ---------------------------------------------------------------------------


def outside(settings: BaseModel) -> dict[str, Path]:
    """The files and folders that a pass reads, by the setting that names them ("training.resume")."""
    found = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Path):
            found[name] = value
        elif isinstance(value, BaseModel):
            found |= {f"{name}.{inner}": path for inner, path in outside(value).items()}
    return found
