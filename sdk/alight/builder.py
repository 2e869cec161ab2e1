"""The contract between alight and whatever builds artifacts: request, candidates, result.

A builder takes a model in the store and makes the form of it that fits a device. The converters register
theirs under the entry point group `alight.builders`, by format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alight.artifact import Artifact
from alight.devices import Device
from alight.errors import Unsupported
from alight.evaluate import Quality, Speed
from alight.planner import Prediction

Progress = Callable[[str, int, int], None]  # what, steps done, steps in all

MAX_KL = 0.05  # nats; about what a 4-bit k-quant loses on models of a few billion parameters


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What to build, for which device, within which limits.

    Args:
        types: quantization types to try; None lets the planner choose.
        context: tokens the device must hold.
        min_speed: decode, tokens/s. max_memory: bytes. max_kl: nats, mean.
        text: what to measure quality on; None samples it from the source model.
        tokens: how many tokens to measure on.
    """

    source: Artifact
    device: Device
    name: str
    types: tuple[str, ...] | None = None
    context: int = 4096
    min_speed: float = 0.0
    max_memory: int | None = None
    max_kl: float = MAX_KL
    text: str | None = None
    tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One form of the model: predicted for the device, and measured on the machine that built it."""

    quantization: str
    size: int
    prediction: Prediction
    quality: Quality
    speed: Speed
    load_seconds: float
    is_source: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What was built: the artifact in the store, all candidates, and why this one."""

    artifact: Artifact
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reason: str


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
