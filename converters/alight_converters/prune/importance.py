"""How much each unit of a model matters, by its activations or by its gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alight_converters.families import Family
from alight_converters.passes import Progress, silent
from alight_converters.prune.blocks import batches
from alight_converters.prune.structure import Dimension, Structure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

Importance = dict[Dimension, Tensor]  # hidden: (units,); channels and groups: (layers, units)


@dataclass(frozen=True)
class Activations:
    """What a forward pass shows.

    Attributes:
        importance: of every unit.
        energy: for each norm, by its module's name: each hidden channel's share of the squared size of what
            goes in, shape (hidden,), summing to 1.
    """

    importance: Importance
    energy: dict[str, Tensor]


@torch.inference_mode()
def by_activation(
    model: PreTrainedModel, family: Family, structure: Structure, rows: Tensor, progress: Progress = silent
) -> Activations:
    """Importance as in "Compact Language Models via Pruning and Knowledge Distillation" (Minitron,
    Muralidharan et al., 2024), section 2.2.

    A feed-forward channel by the size of its activation before `down`; an attention group by the L2 norm of
    its heads' outputs; a hidden channel by the size of what comes out of every norm, summed over the norms.
    Each is the mean over the tokens of a row, then the L2 norm over rows.
    """
    squares = _zeros(structure)
    by_norm: dict[str, Tensor] = {}
    energy: dict[str, Tensor] = {}

    def channels(layer: int) -> Hook:
        def see(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            squares["channels"][layer] += _over_rows(args[0].abs())

        return see

    def groups(layer: int) -> Hook:
        def see(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            heads = args[0].unflatten(-1, (structure.sizes["groups"], -1))
            squares["groups"][layer] += _over_rows(heads.norm(dim=-1))

        return see

    def norm(name: str) -> Hook:
        def see(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            by_norm[name] = by_norm.get(name, 0) + _over_rows(out.abs())
            share = args[0].float().square()
            share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
            energy[name] = energy.get(name, 0) + share.sum((0, 1), dtype=torch.float64).cpu()

        return see

    hooks: dict[str, Hook] = {family.final_norm: norm(family.final_norm)}
    for i in range(structure.layers):
        layer = f"{family.layers}.{i}"
        hooks |= {f"{layer}.{family.down}": channels(i), f"{layer}.{family.output}": groups(i)}
        hooks |= {f"{layer}.{n}": norm(f"{layer}.{n}") for n in family.norms}
    with _hooked(model, hooks):
        for done, batch in enumerate(parts := list(batches(rows)), 1):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
            progress("reading activations", done, len(parts))
    importance = {dimension: total.sqrt() for dimension, total in squares.items()}
    importance["hidden"] = torch.stack([total.sqrt() for total in by_norm.values()]).sum(0)
    return Activations(importance, {name: total / rows.numel() for name, total in energy.items()})


def by_gradient(
    model: PreTrainedModel, structure: Structure, rows: Tensor, progress: Progress = silent
) -> Importance:
    """Importance as in "LLM-Pruner: On the Structural Pruning of Large Language Models" (Ma et al., 2023):
    first-order Taylor |weight · gradient| of the next-token loss, summed over all weights of a unit.

    The absolute value is taken row by row: over text that the model wrote itself the mean gradient is zero.
    """
    total = _zeros(structure)
    for done, row in enumerate(rows.to(model.device), 1):
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                _add(total, structure, name, (weight.detach() * weight.grad).abs())
        model.zero_grad()
        progress("reading gradients", done, len(rows))
    return total


def _zeros(structure: Structure) -> Importance:
    units, layers = structure.sizes, structure.layers
    return {
        "hidden": torch.zeros(units["hidden"], dtype=torch.float64),
        "channels": torch.zeros(layers, units["channels"], dtype=torch.float64),
        "groups": torch.zeros(layers, units["groups"], dtype=torch.float64),
    }


def _add(total: Importance, structure: Structure, name: str, effect: Tensor) -> None:
    """Give each unit its part of a tensor's effect."""
    layer = structure.layer_of(name)
    for i, axis in enumerate(structure.axes[name]):
        if axis:
            others = [d for d in range(effect.dim()) if d != i]
            along = (effect.sum(others) if others else effect).double().cpu()
            of_units = total[axis.dimension] if axis.dimension == "hidden" else total[axis.dimension][layer]
            of_units.index_add_(0, axis.units, along)


Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


def _over_rows(size: Tensor) -> Tensor:
    """(rows, length, units) -> (units,): the square of the mean over each row, summed."""
    return size.double().mean(1).square().sum(0).cpu()


@contextmanager
def _hooked(model: nn.Module, hooks: dict[str, Hook]) -> Iterator[None]:
    """The model with a forward hook on each of these modules."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
