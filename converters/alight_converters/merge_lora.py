"""The pass that merges a LoRA adapter into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from alight_converters.checkpoint import Checkpoint
from alight_converters.lora import Adapter, merge
from alight_converters.passes import Context, Pass


class MergeLora(Pass):
    """W + scale · (alpha / rank) · B·A, for every module that the adapter has factors for.

    Attributes:
        adapter: the folder that `peft` saved the adapter to.
        scale: how much of it; 1 is what it was trained with.
    """

    kind: Literal["merge_lora"] = "merge_lora"
    adapter: Path
    scale: float = 1.0

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        adapter = Adapter.open(self.adapter)
        context.measured.update(modules=len(adapter.factors), base=adapter.base)
        return merge(checkpoint, adapter, context.folder, self.scale)
