"""Look at what goes into a model's matrices while calibration rows run through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from alight.errors import BadInput

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

    Raises:
        BadInput: out of memory; says how many rows, or how long ones, would fit.
    """
    import torch

    from alight_converters.memory import is_out_of_memory

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, key=key: see(key, inputs[0].flatten(0, -2))
        )
        for name, key in modules.items()
    ]
    rows = calibration.rows
    fits = True
    try:
        with torch.inference_mode():
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch].to(model.device)
                hidden = model.base_model(part, use_cache=False).last_hidden_state
                if head is not None:
                    see(head, hidden.flatten(0, -2))
                if progress:
                    progress("calibration", start + len(part), len(rows))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False  # what would fit is tried when the traceback is gone, which holds tensors
    finally:
        for hook in hooks:
            hook.remove()
    if not fits:
        raise _too_large(model, rows[:batch])


def _too_large(model: PreTrainedModel, rows: torch.Tensor) -> BadInput:
    """Tries smaller batches, then shorter rows, and names the first that goes through the model."""
    import torch

    from alight_converters.memory import release, unless_out_of_memory

    def forward(part: torch.Tensor) -> bool:
        with torch.inference_mode():
            model.base_model(part.to(model.device), use_cache=False)
        return True

    count, length = rows.shape
    smaller = [(count >> i, length) for i in range(1, count.bit_length())]
    smaller += [(1, length >> i) for i in range(1, length.bit_length())]
    hint = "Not one token goes through it: use a device with more memory."
    for n, tokens in smaller:
        release()
        if unless_out_of_memory(partial(forward, rows[:n, :tokens])):
            hint = f"{n} rows of {tokens} tokens would fit."
            if tokens < length:
                hint = f"Rows of {tokens} tokens would fit: set calibration.length to {tokens}."
            break
    what = f"{count} rows of {length} tokens" if count > 1 else f"a row of {length} tokens"
    return BadInput(f"calibration: {what} at once run out of memory on {model.device}", hint=hint)
