"""Depth pruning: whole layers go, those that the model misses least."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from alight.errors import BadInput
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Context
from alight_converters.prune.blocks import Blocks, batches
from alight_converters.prune.structure import filled_config
from alight_converters.prune.target import PruneSize, unreachable

_PER_LAYER = ("layer_types", "no_rope_layers")  # config lists with an entry for each layer


class PruneDepth(PruneSize):
    """Remove layers until the target is met.

    - `influence`: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (Men et
      al., 2024). A layer's block influence is 1 - the mean cosine between its input and its output; the
      layers of least influence go. One forward pass.
    - `greedy`: remove one layer at a time, the one whose removal costs least: the mean KL(source || pruned)
      of the next-token distribution, measured for every layer that is left. Better, because a layer matters
      more or less once others are gone; takes layers² / 2 layer passes for each layer removed. The search
      of "Shortened LLaMA: A Simple Depth Pruning for Large Language Models" (Kim et al., 2024), with KL in
      place of perplexity and each choice made anew.

    Attributes:
        layers: target: how many layers stay.
        tokens: calibration tokens that layers are judged on, at most (one row at least).
    """

    targets: ClassVar[tuple[str, ...]] = (*PruneSize.targets, "layers")

    kind: Literal["prune_depth"] = "prune_depth"
    method: Literal["influence", "greedy"] = "greedy"
    layers: int | None = None
    tokens: int = Field(2048, ge=1)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """Measures `influence`, by layer, and `removed`: each layer (numbered as in the input) and the KL in
        nats once it was gone too. Resumes after the last removal."""
        goal = self._layers_to_keep(checkpoint)
        rows = context.calibration.at_most(self.tokens).rows
        blocks = Blocks(checkpoint.load(device=context.device), checkpoint.family, rows[0])
        source = blocks
        if context.source.folder != checkpoint.folder:
            source = Blocks(context.source.load(device=context.device), context.source.family, rows[0])

        influence = block_influence(blocks, rows)
        journal = _Journal(context, self.model_dump_json())
        kept = [i for i in range(len(blocks)) if i not in journal.layers]
        while len(kept) > goal:
            tried = kept if self.method == "greedy" else [min(kept, key=lambda i: influence[i])]
            costs = removal_costs(blocks, kept, tried, rows, source)
            cheapest = min(costs, key=lambda i: costs[i])
            kept.remove(cheapest)
            journal.add(cheapest, costs[cheapest])
            context.progress("removing layers", len(blocks) - len(kept), len(blocks) - goal)

        made = without_layers(checkpoint, kept, context)
        context.measured.update(
            influence=influence,
            removed=journal.removed,
            layers=len(kept),
            parameters_before=checkpoint.parameters,
            parameters=made.parameters,
            tokens=rows.numel(),
        )
        return made

    def flops(self, checkpoint: Checkpoint, tokens: int) -> float:
        """Each removal runs, for every layer that may go, those after it and the head; the layers before it are run
        once for all, and the source once."""
        layers = sorted(_layer_sizes(checkpoint), reverse=True)
        layer, head = sum(layers) / len(layers), checkpoint.parameters - sum(layers)
        work = float(checkpoint.parameters)  # block influence
        for kept in range(len(layers), self._layers_to_keep(checkpoint), -1):
            tried = kept if self.method == "greedy" else 1
            work += tried * (layer * (kept - 1) / 2 + head) + layer * kept + checkpoint.parameters
        return 2 * work * min(tokens, self.tokens)

    def _layers_to_keep(self, checkpoint: Checkpoint) -> int:
        sizes = sorted(_layer_sizes(checkpoint), reverse=True)
        if self.layers is not None:
            if not 1 <= self.layers < len(sizes):
                raise BadInput(
                    f"{self.layers} layers cannot be kept: {checkpoint.folder.name} has {len(sizes)}",
                    hint=f"Ask for 1 to {len(sizes) - 1}.",
                )
            return self.layers
        limit = self.limit(checkpoint)
        rest = checkpoint.parameters - sum(sizes)
        if rest + sizes[0] > limit:
            raise unreachable(checkpoint, limit, rest + sizes[0], "with one layer left")
        return max(n for n in range(1, len(sizes)) if rest + sum(sizes[:n]) <= limit)


def block_influence(blocks: Blocks, rows: Tensor) -> list[float]:
    """ShortGPT's BI of each layer: 1 - the mean over tokens of cos(input, output)."""
    total = torch.zeros(len(blocks), dtype=torch.float64)
    for batch in batches(rows):
        hidden = blocks.embed(batch)
        for i in range(len(blocks)):
            out = blocks.layer(i, hidden)
            total[i] += torch.cosine_similarity(hidden, out, dim=-1).double().sum().cpu()
            hidden = out
    return [float(x) for x in 1 - total / rows.numel()]


def removal_costs(
    blocks: Blocks, kept: Sequence[int], tried: Sequence[int], rows: Tensor, source: Blocks
) -> dict[int, float]:
    """For each layer of `tried`: the mean KL(source || model) per token, in nats, of the layers of `kept`
    without that one."""
    total = dict.fromkeys(tried, 0.0)
    for batch in batches(rows):
        expected = source.log_probs(source.run(source.embed(batch), range(len(source))))
        hidden = blocks.embed(batch)
        for place, layer in enumerate(kept):
            if layer in total:
                found = blocks.log_probs(blocks.run(hidden, kept[place + 1 :]))
                total[layer] += _kl(expected, found)
            hidden = blocks.layer(layer, hidden)
    return {layer: kl / rows.numel() for layer, kl in total.items()}


def without_layers(checkpoint: Checkpoint, kept: Sequence[int], context: Context) -> Checkpoint:
    """Write the checkpoint with these layers only, numbered anew."""
    prefix = f"{checkpoint.family.layers}."
    place = {layer: new for new, layer in enumerate(kept)}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in checkpoint.tensors():
            if not name.startswith(prefix):
                yield name, tensor
                continue
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) in place:
                yield f"{prefix}{place[int(number)]}.{rest}", tensor

    changed = {"num_hidden_layers": len(kept)}
    return checkpoint.with_tensors(tensors(), context.folder, **changed, **_per_layer(checkpoint, kept))


def _per_layer(checkpoint: Checkpoint, kept: Sequence[int]) -> dict[str, Any]:
    """What the config says of each layer, also where it leaves that to transformers: that fills it in by the
    layer's number, which changes."""
    full = filled_config(checkpoint)
    return {key: [full[key][i] for i in kept] for key in _PER_LAYER if full.get(key)}


def _layer_sizes(checkpoint: Checkpoint) -> list[int]:
    """Parameters of each layer."""
    prefix = f"{checkpoint.family.layers}."
    sizes: Counter[int] = Counter()
    for name, shape in checkpoint.shapes.items():
        if name.startswith(prefix):
            sizes[int(name.removeprefix(prefix).partition(".")[0])] += math.prod(shape)
    return [sizes[i] for i in range(len(sizes))]


def _kl(expected: Tensor, found: Tensor) -> float:
    """Sum over tokens of KL, both log-probabilities (rows, length, vocabulary)."""
    return float((expected.exp() * (expected - found)).sum(-1, dtype=torch.float64).sum())


class _Journal:
    """The layers removed so far, on disk after each, so that a search of hours resumes where it was."""

    def __init__(self, context: Context, config: str) -> None:
        what = f"{config} {context.calibration.digest}"
        self._file = context.work / f"removed-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
        self.removed: list[dict[str, Any]] = []
        if self._file.exists():
            self.removed = json.loads(self._file.read_text())

    @property
    def layers(self) -> set[int]:
        return {step["layer"] for step in self.removed}

    def add(self, layer: int, kl: float) -> None:
        self.removed.append({"layer": layer, "kl": kl})
        part = self._file.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w") as opened:
            opened.write(json.dumps(self.removed))
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(self._file)
