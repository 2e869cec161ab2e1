"""The contract between alight and whatever builds artifacts: request, candidates, result.

A builder takes a model and makes the form of it that fits a device. The converters register theirs under the
entry point group `alight.builders`, by format. What runs recipe files is registered under `alight.recipes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alight.artifact import Artifact, Description, Layer, media_type
from alight.devices import Device
from alight.errors import BadInput, Unsupported
from alight.evaluate import Quality, Speed
from alight.planner import Prediction, shape_of_checkpoint
from alight.sources.fetched import short_name

Progress = Callable[[str, int, int], None]  # what, steps done, steps in all

MAX_KL = 0.05  # nats; about what a 4-bit k-quant loses on models of a few billion parameters


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What to build, for which device, within which limits.

    Args:
        formats: of the artifacts: one for each. With GGUF alone, the best of the types is kept.
        types: the forms to build, such as "Q8_0", "Q4_K_M+imatrix" or, of other formats, "int4" or "q4f16_1"; None
            searches among those of GGUF, and takes the usual one of each format where there are others.
        context: tokens that each of the streams must hold. streams: sequences decoded together.
        min_speed: decode of each stream, tokens/s. max_memory: bytes. max_kl: nats, mean.
        text: what to measure quality on; None samples it from the source model.
        tokens: how many tokens to measure on.
        calibration: what importance matrices are made from: a text; the path of a file or folder (.txt, .md, .jsonl or
            .json of texts or chats, .csv, .parquet, .arrow); or a data set, `hf://datasets/organisation/name`. The
            first 131,072 tokens are used. None samples it from the source model.
        folder: where to write the artifact as a plain folder, too.
    """

    source: Artifact
    device: Device
    name: str
    formats: tuple[str, ...] = ("gguf",)
    types: tuple[str, ...] | None = None
    context: int = 4096
    streams: int = 1
    min_speed: float = 0.0
    max_memory: int | None = None
    max_kl: float = MAX_KL
    text: str | None = None
    tokens: int = 2048
    calibration: str | Path | None = None
    seed: int = 0
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One form of the model: predicted for the device, and measured on the machine that built it.

    Attributes:
        memory_bytes: what the process took while the model was loaded; 0: not measured, since the device is another.
        stream_speed: decode of each of the request's streams, tokens/s.
        is_source: the source as it is.
        format: of the artifact.
    """

    quantization: str
    size: int
    prediction: Prediction
    quality: Quality
    speed: Speed
    load_seconds: float
    is_source: bool = False
    memory_bytes: int = 0
    stream_speed: float | None = None
    format: str = "gguf"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What was built: the chosen artifact in the store, all candidates, and why this one.

    Attributes:
        front: the candidates that no other beats in size, KL and speed at once.
        artifacts: all that were kept; a recipe keeps each of its exports.
    """

    artifact: Artifact
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reason: str
    front: tuple[Candidate, ...] = ()
    artifacts: tuple[Artifact, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One step of a recipe, before it runs.

    Attributes:
        seconds: expected; what it took where it is `cached`; None: nothing is known to tell it from.
        machine: what `seconds` are expected of, where it is not this machine.
        memory: bytes of the process that does it, expected; 0: small.
    """

    name: str
    cached: bool
    seconds: float | None
    memory: int
    machine: str = ""


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """What a recipe would do: its stages in order, and what its exports would be on the device.

    Attributes:
        unpredicted: exports of which nothing is known before they are made.
    """

    name: str
    device: Device
    stages: tuple[PlannedStage, ...]
    exports: tuple[Prediction, ...]
    unpredicted: tuple[str, ...] = ()


class RecipeRunner(ABC):
    """Runs recipe files.

    Args of both methods:
        file: the recipe.
        device: what its artifacts are for; None takes the recipe's own.
        name: in the store; None takes the recipe's own.
    """

    @abstractmethod
    def plan(self, file: Path, *, device: Device | None = None, name: str | None = None) -> RecipePlan:
        """What `build` would do. Raises BadInput, with the line, for a recipe that is wrong."""

    @abstractmethod
    def build(
        self,
        file: Path,
        *,
        device: Device | None = None,
        name: str | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> BuildResult:
        """Run it. Stages that ran before with the same input and settings are not repeated.

        Raises:
            AlightError: what is wrong, the value, and what to do next; finished stages are kept.
        """


class Builder(ABC):
    """Builds one artifact format."""

    @abstractmethod
    def plan(self, request: BuildRequest) -> list[Prediction]:
        """What `build` would try, from headers alone.

        Raises:
            DoesNotFit, BadInput: the limits cannot be met; says which one binds.
        """

    @abstractmethod
    def build(self, request: BuildRequest, progress: Progress | None = None) -> BuildResult:
        """Build, measure and choose; the chosen artifact is in the store under `request.name`."""

    def convert(self, source: Path, target: Path, quantization: str) -> Path:
        """Write a weight file anew in another quantization type, and measure nothing. Returns `target`.

        Raises:
            Unsupported: this builder cannot. BadInput: unknown type. DiskFull: no room.
        """
        raise Unsupported(f"{type(self).__name__} does not convert files", hint="Use `alight build`.")


def loose_folder(path: Path) -> Artifact | None:
    """A checkpoint or LoRA adapter folder as it lies, without copying it into the store; None for anything else.

    Its format is "safetensors", or "lora" for an adapter.
    """
    path = path.expanduser()
    adapter = (path / "adapter_config.json").is_file()
    if not adapter and not (path / "config.json").is_file():
        return None
    files = {f.name: f for f in sorted(path.iterdir()) if f.is_file() and not f.name.startswith(".")}
    name = short_name(path.resolve().name)
    layers = tuple(Layer(inside, media_type(inside), "", f.stat().st_size) for inside, f in files.items())
    if adapter:
        return Artifact(name, "", Description("lora", title=name), layers, files)
    shape = shape_of_checkpoint(files)
    about = Description("safetensors", shape.architecture, shape.parameters, title=name)
    return Artifact(name, "", about, layers, files)


def parse_bytes(text: str) -> int:
    """ "900MB", "1.5GB", "2GiB" or a plain number of bytes."""
    units = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 1 << 10,
        "mib": 1 << 20,
        "gib": 1 << 30,
    }
    number = text.rstrip("bBkKmMgGiI ")
    unit = text[len(number) :].strip().lower()
    try:
        return int(float(number) * units[unit if unit in ("", "b") or unit.endswith("b") else unit + "b"])
    except (ValueError, KeyError, OverflowError):
        raise BadInput(
            f"{text!r} is not a size", hint="Write it as 900MB, 1.5GB or a number of bytes."
        ) from None
