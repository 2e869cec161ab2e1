"""The state of a training run on disk, from which a killed run goes on."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alight.errors import BadInput, DiskFull

FILE = "training.pt"


@dataclass
class State:
    """Where a run is.

    Attributes:
        of: what identifies the run; a state is never read into another one.
        step: steps done. losses: mean loss per predicted token of each of them.
    """

    of: str
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def save(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write everything whole or not at all. Frozen weights are not written: they are the input's."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{FILE}.part"
        everything = {
            "of": self.of,
            "step": self.step,
            "losses": self.losses,
            "model": trained(model),
            "optimizer": optimizer.state_dict(),
            "rng": _rng(),
        }
        try:
            with part.open("wb") as file:
                torch.save(everything, file)
                file.flush()
                os.fsync(file.fileno())
            part.rename(folder / FILE)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError when the disk is full
            part.unlink(missing_ok=True)
            if getattr(error, "errno", None) == 28 or "write" in str(error):
                raise DiskFull(folder) from error
            raise

    def load(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go on from what is saved in `folder`, if anything is.

        Raises:
            BadInput: it is another run's state.
        """
        file = folder / FILE
        if not file.exists():
            return
        saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if saved["of"] != self.of:
            raise BadInput(f"{file} is the state of another training run", hint="Delete it to start anew.")
        self.step, self.losses = saved["step"], saved["losses"]
        model.load_state_dict(saved["model"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if "cuda" in saved["rng"]:
            torch.cuda.set_rng_state(saved["rng"]["cuda"])


def identity(*parts: str) -> str:
    """One name for what a run depends on: its config and the digests of its inputs."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that training changes, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _rng() -> dict[str, torch.Tensor]:
    cpu = {"cpu": torch.get_rng_state()}
    return cpu | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
