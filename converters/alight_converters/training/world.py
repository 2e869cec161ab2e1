"""The processes that train together: one, or as many as `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(hours=12)  # the others wait while one writes a checkpoint


@dataclass(frozen=True)
class World:
    """This process among `size`, and the device it computes on."""

    rank: int
    size: int
    device: str

    @classmethod
    def join(cls, device: str) -> World:
        """The world of this process. More than one GPU needs one process for each: `torchrun --nproc-per-node N`."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(0, 1, device)
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), size, device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, *values: float | Tensor) -> list[float]:
        """Sums over all processes."""
        numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.size > 1:
            dist.all_reduce(numbers)
        return [float(n) for n in numbers]
