"""Which rows and columns of which tensor go together: the units that width pruning removes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alight.errors import InvalidModelFile, Unsupported
from alight_converters.checkpoint import Checkpoint

Dimension = Literal["hidden", "channels", "groups"]
Sizes = Mapping[Dimension, int]


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: the unit that each of its rows (or columns) belongs to.

    A fused matrix names a unit in several places: `gate_up_proj` has channel 0 in its first row and in the
    row where `up` begins.
    """

    dimension: Dimension
    units: Tensor


Axes = tuple[Axis | None, ...]  # None: an axis that width pruning leaves alone, such as the vocabulary


class Structure:
    """The coupled structures of a decoder, as LLM-Pruner calls them.

    Units are hidden channels (the same in all layers), feed-forward channels, and attention groups: a
    key-value head with the query heads that use it. The latter two are each layer's own.

    Attributes:
        sizes: how many units there are of each dimension.
        heads_per_group: query heads to a key-value head.

    Raises:
        Unsupported: a layer has a tensor that the family does not name. InvalidModelFile: a tensor has
            another shape than the config says.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._family = checkpoint.family
        config = filled_config(checkpoint)
        heads = int(config["num_attention_heads"])
        groups = int(config.get("num_key_value_heads") or heads)
        self.head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        self.heads_per_group = heads // groups
        self.layers = int(config["num_hidden_layers"])
        self.sizes: dict[Dimension, int] = {
            "hidden": int(config["hidden_size"]),
            "channels": int(config["intermediate_size"]),
            "groups": groups,
        }
        self.axes: dict[str, Axes] = {}
        self._terms: Counter[tuple[Dimension, ...]] = Counter()
        for name, shape in checkpoint.shapes.items():
            axes = self._axes(name, shape)
            if any(axis and len(axis.units) != n for axis, n in zip(axes, shape, strict=True)):
                raise InvalidModelFile(
                    f"tensor {name!r} has shape {list(shape)}, which its config contradicts"
                )
            self.axes[name] = axes
            self._count(axes, shape)

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor belongs to; None outside the layers."""
        prefix = f"{self._family.layers}."
        if not name.startswith(prefix):
            return None
        return int(name.removeprefix(prefix).partition(".")[0])

    def parameters(self, sizes: Sizes) -> int:
        """Parameters of the whole checkpoint at these sizes."""
        return sum(count * math.prod(sizes[d] for d in term) for term, count in self._terms.items())

    def _count(self, axes: Axes, shape: tuple[int, ...]) -> None:
        """A tensor's size is a product: of a number, and of the size of each dimension it has."""
        term = tuple(axis.dimension for axis in axes if axis)
        scale = (n // self.sizes[axis.dimension] if axis else n for axis, n in zip(axes, shape, strict=True))
        self._terms[term] += math.prod(scale)

    def _axes(self, name: str, shape: tuple[int, ...]) -> Axes:
        family = self._family
        hidden = Axis("hidden", torch.arange(self.sizes["hidden"]))
        module, _, leaf = name.rpartition(".")
        if self.layer_of(name) is None:
            if module in (family.embedding, family.head) and leaf == "weight":
                return (None, hidden)
            if module == family.final_norm:
                return (hidden,)
            if module == family.head:
                return (None,)
            raise Unsupported(f"width pruning of {name!r}, which family {family.name} does not name")
        module = module.removeprefix(f"{family.layers}.").partition(".")[2]
        if module in family.norms:
            return (hidden,)
        rows = self._rows(module)
        if rows is not None:
            return (rows, self._columns(module))[: len(shape)]
        if module in (family.query_norm, family.key_norm) and shape == (self.head_dim,):
            return (None,)  # the same for all heads
        raise Unsupported(f"width pruning of {name!r}, which family {family.name} does not name")

    def _rows(self, module: str) -> Axis | None:
        """Output units of a projection, those of a fused one after each other."""
        family = self._family
        queries, keys = self._heads(self.heads_per_group), self._heads(1)
        attention = ((family.queries, queries), (family.keys, keys), (family.values, keys))
        found = [units for path, units in attention if path == module]
        if found:
            return Axis("groups", torch.cat(found))
        channels = [torch.arange(self.sizes["channels"])] * (family.gate, family.up).count(module)
        if channels:
            return Axis("channels", torch.cat(channels))
        if module in (family.output, family.down):
            return Axis("hidden", torch.arange(self.sizes["hidden"]))
        return None

    def _columns(self, module: str) -> Axis:
        """Input units of a projection."""
        if module == self._family.output:
            return Axis("groups", self._heads(self.heads_per_group))
        if module == self._family.down:
            return Axis("channels", torch.arange(self.sizes["channels"]))
        return Axis("hidden", torch.arange(self.sizes["hidden"]))

    def _heads(self, per_group: int) -> Tensor:
        """The group of each channel of all heads."""
        return torch.arange(self.sizes["groups"]).repeat_interleave(per_group * self.head_dim)


def filled_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """`config.json` with the defaults that it leaves to transformers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    return dict(config.to_dict())
