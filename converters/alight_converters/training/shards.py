"""Tensors too expensive to compute twice: one file per shard, each written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from alight_converters.passes import Progress
from alight_converters.training.world import World


def make_shards(
    folder: Path,
    count: int,
    make: Callable[[int], dict[str, Tensor]],
    world: World,
    progress: Progress,
    what: str,
) -> list[Path]:
    """Compute those of `count` shards that are not in `folder` yet, this process's share of them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:05}.safetensors" for i in range(count)]
    for i in range(world.rank, count, world.size):
        if not files[i].exists():
            part = files[i].with_suffix(f".{os.getpid()}.part")
            save_file({name: t.contiguous().cpu() for name, t in make(i).items()}, part)
            with part.open("rb+") as opened:
                os.fsync(opened.fileno())
            part.rename(files[i])
        if world.is_first:
            progress(what, i + 1, count)
    world.wait()
    return files
