"""Width pruning: attention groups, feed-forward channels and hidden channels go, in every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from alight.errors import BadInput
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Context
from alight_converters.prune.importance import by_activation, by_gradient
from alight_converters.prune.sizes import choose, combinations, steps
from alight_converters.prune.structure import Dimension, Sizes, Structure
from alight_converters.prune.target import PruneSize, unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kept = dict[Dimension, Tensor]  # unit numbers in order; hidden: (size,); channels, groups: (layers, size)


class PruneWidth(PruneSize):
    """Remove the least important units of each layer, and of the hidden state, until the target is met.

    All layers get the same widths, as a config can say no more, but each keeps its own most important
    channels and groups. The hidden state is one, so its channels are chosen for all layers together.

    - `activation`: Minitron, "Compact Language Models via Pruning and Knowledge Distillation" (Muralidharan
      et al., 2024).
    - `gradient`: "LLM-Pruner: On the Structural Pruning of Large Language Models" (Ma et al., 2023). Needs
      memory for a gradient of each weight.

    Attributes:
        axes: what may shrink: "channels" of the feed-forward network, attention "groups" (a key-value head
            with its query heads), "hidden" channels.
        sizes: target: how many units of an axis stay, as `{"channels": 1024}`, instead of a size in all.
        multiple: what widths are multiples of; left out, 256 where the width was one (k-quants need it), and
            32 where not (other quantized types need that).
        tokens: calibration tokens that units are judged on, at most (one row at least).
    """

    targets: ClassVar[tuple[str, ...]] = (*PruneSize.targets, "sizes")

    kind: Literal["prune_width"] = "prune_width"
    method: Literal["activation", "gradient"] = "activation"
    axes: tuple[Dimension, ...] = Field(("channels",), min_length=1)
    sizes: dict[Dimension, int] | None = None
    multiple: int | None = Field(None, ge=1)
    tokens: int = Field(65536, ge=1)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """Measures the widths and parameters before and after."""
        structure = Structure(checkpoint)
        sizes = self._sizes(checkpoint, structure)
        changed = config_of(sizes, structure)
        rows = context.calibration.at_most(self.tokens).rows
        model = checkpoint.load(device=context.device)
        seen = by_activation(model, checkpoint.family, structure, rows, context.progress)
        importance = seen.importance
        if self.method == "gradient":
            importance = by_gradient(model, structure, rows, context.progress)
        kept: Kept = {
            axis: units.topk(sizes[axis]).indices.sort().values for axis, units in importance.items()
        }
        scales = _scales(checkpoint, model, structure, kept["hidden"], seen.energy)
        del model
        tensors = _narrowed(checkpoint, structure, kept, scales)
        made = checkpoint.with_tensors(tensors, context.folder, **changed)
        context.measured.update(
            widths_before=structure.sizes,
            widths=dict(sizes),
            parameters_before=checkpoint.parameters,
            parameters=made.parameters,
            tokens=rows.numel(),
        )
        return made

    def _sizes(self, checkpoint: Checkpoint, structure: Structure) -> Sizes:
        if self.sizes is not None:
            return self._exact_sizes(checkpoint, structure, self.sizes)
        limit = self.limit(checkpoint)
        options = {axis: steps(structure, axis, self.multiple) for axis in self.axes}

        @cache  # the configs' checks are of the hidden size and heads; channels make too many combinations
        def loads(hidden: int, groups: int) -> bool:
            return not _refusal(checkpoint, structure.sizes | {"hidden": hidden, "groups": groups}, structure)

        loadable = [s for s in combinations(structure, options) if loads(s["hidden"], s["groups"])]
        chosen = choose(structure, limit, self.axes, loadable)
        if chosen is None:
            least = min(structure.parameters(sizes) for sizes in loadable)
            raise unreachable(checkpoint, limit, least, f"when {', '.join(self.axes)} are at their narrowest")
        return chosen

    def _exact_sizes(self, checkpoint: Checkpoint, structure: Structure, sizes: Sizes) -> Sizes:
        full = structure.sizes
        wrong = [axis for axis, size in sizes.items() if not 1 <= size <= full[axis]]
        if wrong or all(size == full[axis] for axis, size in sizes.items()):
            raise BadInput(
                f"sizes {dict(sizes)} of a model that has {full}",
                hint="Sizes are at least 1, at most what there is, and one is smaller.",
            )
        reason = _refusal(checkpoint, full | dict(sizes), structure)
        if reason:
            raise BadInput(f"transformers does not load a model of sizes {dict(sizes)}: {reason}")
        return full | dict(sizes)


def config_of(sizes: Sizes, structure: Structure) -> dict[str, int]:
    """What `config.json` says of these sizes. The head size is stated: it is no longer hidden size / heads."""
    return {
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["channels"],
        "num_key_value_heads": sizes["groups"],
        "num_attention_heads": sizes["groups"] * structure.heads_per_group,
        "head_dim": structure.head_dim,
    }


def _refusal(checkpoint: Checkpoint, sizes: Sizes, structure: Structure) -> str:
    """Why transformers would not load a model of these sizes; empty if it would. (Some configs want a hidden
    size that the number of heads divides, even though they state the head size.)"""
    from transformers import AutoConfig

    config = checkpoint.config | config_of(sizes, structure)
    try:
        AutoConfig.for_model(**config)
    except Exception as error:  # each config class checks itself in its own way
        return str(error)
    return ""


def _scales(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    structure: Structure,
    hidden: Tensor,
    energy: Mapping[str, Tensor],
) -> dict[str, float]:
    """What weights are multiplied by, by module, so that the hidden channels left keep the size they had.

    A norm divides by the root of the mean square over the channels. With n of N left, which held the share e
    of the squares, that root becomes sqrt(e N / n) of what it was.
    """
    family, width = checkpoint.family, structure.sizes["hidden"]
    share = len(hidden) / width
    if share == 1:
        return {}
    scales = {norm: math.sqrt(float(part[hidden].sum()) / share) for norm, part in energy.items()}
    if math.isclose(_embedding_scale(model), math.sqrt(width), rel_tol=0.01):
        scales[family.embedding] = share**-0.5
        if model.config.tie_word_embeddings:
            scales[family.head] = share**-0.5
            scales[family.final_norm] *= share**0.5
    return scales


def _embedding_scale(model: PreTrainedModel) -> float:
    """What the model multiplies its embeddings by: 1, or in Gemma the root of the hidden size."""
    embedding: nn.Module = model.get_input_embeddings()
    weight = embedding.get_parameter("weight").detach()
    token = weight.norm(dim=1).argmax()  # none that is all zeros, as padding may be
    return float(embedding(token[None]).detach().norm() / weight[token].norm())


def _narrowed(
    checkpoint: Checkpoint, structure: Structure, kept: Kept, scales: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors with the units in `kept`, scaled."""
    family = checkpoint.family
    for name, tensor in checkpoint.tensors():
        layer, module = structure.layer_of(name), name.rpartition(".")[0]
        for dim, axis in enumerate(structure.axes[name]):
            if axis:
                units = kept[axis.dimension] if axis.dimension == "hidden" else kept[axis.dimension][layer]
                tensor = tensor.index_select(dim, torch.isin(axis.units, units).nonzero()[:, 0])
        if module in scales:
            offset = 0.0 if module in (family.embedding, family.head) else family.norm_offset
            tensor = ((tensor.float() + offset) * scales[module] - offset).to(tensor.dtype)
        yield name, tensor
