"""Scale the inputs of matrices, and undo it where those inputs come from: the model computes the same.

A norm's output, a value's channel or a channel of the feed-forward network can be divided by any number if
the columns that read it are multiplied by it. Methods that move difficulty between weights and activations
(AWQ, SmoothQuant) differ only in how they choose the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from alight_converters.checkpoint import Checkpoint


@dataclass(frozen=True)
class Group:
    """Matrices that read one input, and what writes it.

    Attributes:
        readers: modules whose columns are multiplied.
        writer: the norm or matrix whose output is divided.
        width: numbers that can be scaled, the last `width` rows of the writer.
        heads: into how many blocks of rows the writer's output is cut, each of which is
        repeats: read this many times (several query heads share one value head).
    """

    readers: tuple[str, ...]
    writer: str
    width: int
    heads: int = 1
    repeats: int = 1

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales of the writer's rows, shape (width,) -> of the readers' columns, (repeats * width,)."""
        return scales.view(self.heads, -1).repeat_interleave(self.repeats, 0).flatten()

    def gather(self, columns: torch.Tensor) -> torch.Tensor:
        """The largest of what the columns that read one row have: the other way, (..., columns) -> (..., width)."""
        shape = (*columns.shape[:-1], self.heads, self.repeats, -1)
        return columns.reshape(shape).amax(-2).flatten(-2)


def groups(checkpoint: Checkpoint, *, norms_only: bool = False) -> list[Group]:
    """All places of a checkpoint where scales can be folded; with `norms_only` those behind a norm."""
    family, config = checkpoint.family, checkpoint.full_config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_width = config.get("head_dim") or config["hidden_size"] // heads
    norms = dict(zip(family.gguf_norms, family.norms, strict=True))
    found = []
    for layer in range(config["num_hidden_layers"]):
        at = f"{family.layers}.{layer}."
        attention = tuple(dict.fromkeys(at + m for m in (family.queries, family.keys, family.values)))
        feed_forward = tuple(dict.fromkeys(at + m for m in (family.gate, family.up)))
        for norm, readers in (("attn_norm", attention), ("ffn_norm", feed_forward)):
            if norm in norms:  # some families norm the output of a block instead
                found.append(Group(readers, at + norms[norm], config["hidden_size"]))
        if not norms_only:
            # Fused matrices hold values, and the upper half of a gated network, in their last rows.
            values = Group(
                (at + family.output,), at + family.values, kv_heads * head_width, kv_heads, heads // kv_heads
            )
            found += [values, Group((at + family.down,), at + family.up, config["intermediate_size"])]
    return found


def fold(checkpoint: Checkpoint, scales: Mapping[Group, torch.Tensor], folder: Path) -> Checkpoint:
    """Write the checkpoint with each group's input divided by its scales, shape (width,), all positive.

    Weights are stored in float32: rounding scaled bfloat16 again would change the function.
    """
    columns: dict[str, torch.Tensor] = {}
    rows: dict[str, torch.Tensor] = {}
    for group, scale in scales.items():
        columns |= dict.fromkeys(group.readers, group.spread(scale.double()))
        rows[group.writer] = scale.double()
    offset = checkpoint.family.norm_offset

    def folded() -> Iterator[tuple[str, torch.Tensor]]:
        for name, stored in checkpoint.tensors():
            module = name.rpartition(".")[0]
            tensor = stored.double() if module in columns or module in rows else stored
            if module in columns and tensor.ndim == 2:
                tensor = tensor * columns[module]
            if module in rows:
                shift = offset if tensor.ndim == 1 and _is_norm(checkpoint, module) else 0.0
                tensor = _divided(tensor + shift, rows[module]) - shift
            yield name, tensor.float()

    return checkpoint.with_tensors(folded(), folder, dtype="float32")


def _divided(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The last rows, as many as there are scales, divided."""
    by = scale if tensor.ndim == 1 else scale[:, None]
    kept = len(tensor) - len(scale)
    return torch.cat([tensor[:kept], tensor[kept:] / by])


def _is_norm(checkpoint: Checkpoint, module: str) -> bool:
    return module.endswith(checkpoint.family.norms)
