"""A decoder taken apart: embedding, layers one at a time, and head, for any family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alight_converters.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 1024  # tokens in one forward pass, or one row if that is longer


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Rows in batches of about `BATCH` tokens."""
    count = max(1, BATCH // rows.shape[1])
    for start in range(0, len(rows), count):
        yield rows[start : start + count]


class Blocks:
    """Runs a model's layers one by one, in any order or selection.

    The model's own forward pass does what is around the layers, so scaled embeddings, sliding windows and
    soft-capped logits are as the family has them. Rows of one length only: masks and positions are kept
    from a first pass over one row, and serve any number of rows.

    Args:
        model: in evaluation mode.
        row: one row of token ids, shape (length,).
    """

    def __init__(self, model: PreTrainedModel, family: Family, row: Tensor) -> None:
        self._model = model
        parent, _, self._name = family.layers.rpartition(".")
        self._decoder = model.get_submodule(parent)
        self.layers: list[nn.Module] = list(model.get_submodule(family.layers).children())
        self._arguments: list[dict[str, Any]] = []
        hooks = [
            layer.register_forward_pre_hook(self._keep_arguments, with_kwargs=True) for layer in self.layers
        ]
        self._decode(row[None])
        for hook in hooks:
            hook.remove()

    def __len__(self) -> int:
        return len(self.layers)

    def embed(self, rows: Tensor) -> Tensor:
        """What the first layer sees of token ids (rows, length): shape (rows, length, hidden)."""
        seen = _Stand()
        with self._replaced(seen):
            self._decode(rows)
        return seen.value

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """One layer's output for its input, both (rows, length, hidden), on the layer's device."""
        arguments = _moved(self._arguments[index], hidden.device)
        with torch.inference_mode():
            out: Tensor = self.layers[index](hidden, **arguments)
        return out

    def run(self, hidden: Tensor, layers: Sequence[int]) -> Tensor:
        """The output of these layers, one after the other."""
        for index in layers:
            hidden = self.layer(index, hidden)
        return hidden

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Next-token log-probabilities (rows, length, vocabulary) after the last layer's output."""
        tokens = hidden.new_zeros(hidden.shape[:2], dtype=torch.long)  # any: their embeddings go nowhere
        with self._replaced(_Stand(hidden)), torch.inference_mode():
            logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return logits.float().log_softmax(-1)

    def _keep_arguments(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments.append(kwargs)

    @torch.inference_mode()
    def _decode(self, rows: Tensor) -> None:
        self._decoder(input_ids=rows.to(self._model.device), use_cache=False)

    @contextmanager
    def _replaced(self, layer: nn.Module) -> Iterator[None]:
        """The model with one layer in place of all."""
        layers = getattr(self._decoder, self._name)
        setattr(self._decoder, self._name, nn.ModuleList([layer]))
        try:
            yield
        finally:
            setattr(self._decoder, self._name, layers)


class _Stand(nn.Module):
    """Stands for all layers: keeps what comes in as `value`, and passes it on, or what it was given."""

    def __init__(self, value: Tensor | None = None) -> None:
        super().__init__()
        self._given = value
        self.value: Tensor

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        self.value = hidden
        return hidden if self._given is None else self._given


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples and dicts, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(inner, device) for inner in value)
    return value
