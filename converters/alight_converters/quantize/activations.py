"""Look at what goes into a model's matrices while calibration rows run through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # torch is slow to import, and not every user of this package needs it
    import torch
    from transformers import PreTrainedModel

    from alight_converters.calibration import Calibration
    from alight_converters.passes import Progress

Key = TypeVar("Key")


def observe(
    model: PreTrainedModel,
    modules: Mapping[str, Key],
    see: Callable[[Key, torch.Tensor], None],
    calibration: Calibration,
    *,
    head: Key | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> None:
    """Call `see` with the inputs, shape (tokens, columns), of modules, by the key that each name has.

    Args:
        modules: names of linear modules -> what to call `see` with.
        head: the key of the output matrix's input. (Logits themselves are not computed.)
        batch: rows that go through the model together.
    """
    import torch

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, key=key: see(key, inputs[0].flatten(0, -2))
        )
        for name, key in modules.items()
    ]
    rows = calibration.rows
    try:
        with torch.inference_mode():
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch].to(model.device)
                hidden = model.base_model(part, use_cache=False).last_hidden_state
                if head is not None:
                    see(head, hidden.flatten(0, -2))
                if progress:
                    progress("calibration", start + len(part), len(rows))
    finally:
        for hook in hooks:
            hook.remove()
