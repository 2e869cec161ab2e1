"""The processes that train together: one, or as many as `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alight.errors import AlightError

T = TypeVar("T")
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

    def by_first(self, do: Callable[[], T]) -> T:
        """What `do` returns in the first process, in all of them; the others wait meanwhile.

        Raises:
            AlightError: that of the first process. Any other error ends that one, and the launcher the others.
        """
        if self.size == 1:
            return do()
        error: AlightError | None = None
        # The result; or what the error says, since not all errors can be pickled.
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = do()
            except AlightError as caught:
                error, told[1] = caught, (caught.message, caught.hint)
        dist.broadcast_object_list(told, src=0)
        if told[1]:
            raise error or AlightError(told[1][0], hint=told[1][1])
        result: T = told[0]
        return result

    def sum(self, *values: float | Tensor) -> list[float]:
        """Sums over all processes."""
        numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.size > 1:
            dist.all_reduce(numbers)
        return [float(n) for n in numbers]
