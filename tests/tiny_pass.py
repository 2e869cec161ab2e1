"""A pass of a third party, for tests: registered by a distribution of its own, made on the spot.

It multiplies the final norm, and writes down each run. With `killed`, its first run is killed in the middle.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Literal

from pydantic import Field

from alight.errors import BadInput
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Context, Pass

METADATA = "Metadata-Version: 2.1\nName: tiny-pass\nVersion: 1.0\n"
ENTRY_POINTS = "[alight.passes]\nscale = tiny_pass:Scale\n"


class Scale(Pass):
    kind: Literal["scale"] = "scale"
    factor: float = Field(1.0, gt=0, lt=10)
    log: str
    beside: Path | None = None
    killed: bool = False
    refuses: bool = False

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        state = context.work / "halfway"
        resumed = state.exists()
        with Path(self.log).open("a") as log:
            print(f"scale {self.factor:g}{' resumed' if resumed else ''}", file=log)
        if self.refuses:
            raise BadInput("the factor is refused", hint="Give another.")
        if self.killed and not resumed:
            state.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        context.measured["losses"] = [3.0, 2.0, 1.5]
        name = checkpoint.family.final_norm + ".weight"
        tensors = ((n, t * self.factor if n == name else t) for n, t in checkpoint.tensors())
        return checkpoint.with_tensors(tensors, context.folder)


def register(folder: Path) -> Path:
    """A folder that, on the import path, makes the pass known by entry point."""
    info = folder / "tiny_pass-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "tiny_pass.py").write_text(Path(__file__).read_text())
    return folder
