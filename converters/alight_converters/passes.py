"""What a pass is: a frozen, validated config with a `run` that turns one checkpoint into another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint

Progress = Callable[[str, int, int], None]  # what, steps done, steps in all


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Context:
    """What a pass may use besides its input.

    Attributes:
        folder: where the new checkpoint goes; it does not exist yet.
        work: a folder that survives a crash of this stage, for what `run` needs to resume.
        source: the checkpoint that the recipe began with: the default teacher and reference.
        calibration: token rows in the source model's own distribution.
        device: "cpu", "cuda" or "cuda:N".
        measured: filled by the pass, JSON values only; it goes into the report as it is.
    """

    folder: Path
    work: Path
    source: Checkpoint
    calibration: Calibration
    device: str = "cpu"
    seed: int = 0
    progress: Progress = silent
    measured: dict[str, Any] = field(default_factory=dict)


class Pass(BaseModel):
    """One step of a recipe. A subclass sets `kind` to a literal and registers it under `alight.passes`.

    Attributes:
        in_all_processes: under `torchrun`, `run` is called in every process, and they share the work. Otherwise it
            is called in the first one, and the others wait.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    in_all_processes: ClassVar[bool] = False

    kind: str

    @abstractmethod
    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """Write the new checkpoint to `context.folder` and return it. The input stays as it is.

        Raises:
            AlightError: what is wrong with the input, the value, and what to do next.
        """

    def flops(self, checkpoint: Checkpoint, tokens: int) -> float:
        """Of `run`, about, with so many calibration tokens: a plan tells the time from it. One forward pass, unless
        a subclass knows better."""
        return 2.0 * checkpoint.parameters * tokens
