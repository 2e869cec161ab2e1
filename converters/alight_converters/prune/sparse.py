"""Sparse pruning: zeros in place of weights, anywhere or two in each four."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from alight.errors import BadInput, Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.families import Family
from alight_converters.passes import Context
from alight_converters.prune.blocks import Blocks, batches
from alight_converters.prune.solvers import GROUP, sparsegpt, wanda
from alight_converters.prune.target import Prune, unreachable


class PruneSparse(Prune):
    """Set weights of the layers' matrices to zero: the same share of each, or two in each four inputs.

    The checkpoint keeps its shape and file size; zeros pay where the runtime knows them (2:4 on NVIDIA's
    tensor cores) or where the file is compressed. `ratio` and `parameters` count what is not zero.

    - `wanda`: "A Simple and Effective Pruning Approach for Large Language Models" (Sun et al., 2023).
      Quick; no weight but the zeros changes.
    - `sparsegpt`: "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot" (Frantar &
      Alistarh, 2023). The weights left make good what went. Takes longer, loses less.

    Layers are pruned in order, each on what the pruned ones before it put out. One layer at a time is on the
    device, with its activations going through it batch by batch.

    Attributes:
        sparsity: target: share of zeros in each matrix.
        pattern: target: "2:4".
        damping: what SparseGPT adds to the Hessian's diagonal, as a share of its mean.
        tokens: calibration tokens, at most (one row at least). The papers take 128 rows of 2048.
    """

    targets: ClassVar[tuple[str, ...]] = (*Prune.targets, "sparsity", "pattern")

    kind: Literal["prune_sparse"] = "prune_sparse"
    method: Literal["wanda", "sparsegpt"] = "sparsegpt"
    sparsity: float | None = None
    pattern: Literal["2:4"] | None = None
    damping: float = Field(0.01, gt=0)
    tokens: int = Field(262144, ge=1)

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """Measures `sparsity`, for each layer the share of zeros by matrix, and parameters that are not zero."""
        family = checkpoint.family
        share = self._share(checkpoint)
        rows = context.calibration.at_most(self.tokens).rows
        model = checkpoint.load()
        blocks = Blocks(model, family, rows[0])
        hidden = [blocks.embed(batch) for batch in batches(rows)]
        achieved = []
        for number, layer in enumerate(blocks.layers):
            layer.to(context.device)
            achieved.append(self._prune(blocks, number, hidden, family, share))
            hidden = [blocks.layer(number, part.to(context.device)).cpu() for part in hidden]
            layer.to("cpu")
            context.progress("pruning layers", number + 1, len(blocks))

        pruned = dict(model.named_parameters())
        names = set(_matrices(checkpoint))

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in checkpoint.tensors():
                yield name, pruned[name].detach().to(tensor.dtype) if name in names else tensor

        made = checkpoint.with_tensors(tensors(), context.folder)
        context.measured.update(
            sparsity=achieved,
            parameters_before=checkpoint.parameters,
            parameters=sum(int(tensor.count_nonzero()) for _, tensor in made.tensors()),
            tokens=rows.numel(),
        )
        return made

    def _share(self, checkpoint: Checkpoint) -> float | None:
        """The share of zeros in each matrix; None for 2:4. Checks that the checkpoint allows it."""
        matrices = _matrices(checkpoint)
        if self.pattern:
            for name, (_, inputs) in matrices.items():
                if inputs % GROUP:
                    raise Unsupported(
                        f"2:4 pruning of {name!r}: its {inputs} inputs are no multiple of {GROUP}"
                    )
            return None
        if self.sparsity is not None:
            if not 0 < self.sparsity < 1:
                raise BadInput(
                    f"sparsity {self.sparsity:g} is not between 0 and 1",
                    hint="It is the share of weights that become zero.",
                )
            return self.sparsity
        limit = self.limit(checkpoint)
        prunable = sum(outputs * inputs for outputs, inputs in matrices.values())
        least = checkpoint.parameters - prunable
        if limit <= least:
            raise unreachable(checkpoint, limit, least, "outside the layers' matrices")
        return (checkpoint.parameters - limit) / prunable

    def _prune(
        self, blocks: Blocks, number: int, hidden: list[Tensor], family: Family, share: float | None
    ) -> dict[str, float]:
        """Prune the matrices of one layer in place; returns the share of zeros in each."""
        layer = blocks.layers[number]
        collect = _hessian if self.method == "sparsegpt" else _squares
        seen = _inputs(blocks, number, hidden, list(_sharing_input(family)), collect)
        achieved = {}
        for first, paths in _sharing_input(family).items():
            for path in paths:
                weight = layer.get_parameter(f"{path}.weight")
                if self.method == "sparsegpt":
                    new = sparsegpt(weight.detach(), seen[first], share, self.damping)
                else:
                    new = wanda(weight.detach(), seen[first], share)
                weight.data = new
                achieved[path] = float((new == 0).double().mean())
        return achieved


def _sharing_input(family: Family) -> dict[str, list[str]]:
    """The matrices of a layer, by the first of those that get the same input. A fused one is there once."""
    return {
        family.queries: list(dict.fromkeys((family.queries, family.keys, family.values))),
        family.output: [family.output],
        family.gate: list(dict.fromkeys((family.gate, family.up))),
        family.down: [family.down],
    }


def _matrices(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices that are pruned, by tensor name."""
    family = checkpoint.family
    paths = [path for sharing in _sharing_input(family).values() for path in sharing]
    endings = tuple(f".{path}.weight" for path in paths)
    return {name: shape for name, shape in checkpoint.shapes.items() if name.endswith(endings)}


def _inputs(
    blocks: Blocks, number: int, hidden: list[Tensor], paths: list[str], collect: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """What `collect` makes of the inputs of these modules of a layer, shape (tokens, inputs), summed."""
    layer = blocks.layers[number]
    device = next(layer.parameters()).device
    total: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            found = collect(args[0].flatten(0, -2).float())
            total[path] = total[path] + found if path in total else found

        return see

    with ExitStack() as hooks:
        for path in paths:
            handle = layer.get_submodule(path).register_forward_pre_hook(hook(path))
            hooks.callback(handle.remove)
        for part in hidden:
            blocks.layer(number, part.to(device))
    return total


def _hessian(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs


def _squares(inputs: Tensor) -> Tensor:
    return inputs.square().sum(0)
