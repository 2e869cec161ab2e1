"""Perplexity, KL divergence and top-1 agreement of checkpoints, in torch: windows as `alight.evaluate` cuts them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from alight.evaluate import WINDOW
from alight_converters.checkpoint import Checkpoint
from alight_converters.qat.grids import GRIDS
from alight_converters.qat.qat import attach, merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 8  # windows at once


def measure(
    checkpoint: Checkpoint, tokens: Tensor, *, device: str, against: Checkpoint | None = None
) -> dict[str, float]:
    """In float32. The second half of each window counts; the first half gives it context."""
    model = checkpoint.load(torch.float32, device)
    reference = against.load(torch.float32, device) if against else None
    return _measure(model, tokens, device, reference)


def ptq(source: Checkpoint, grid: str, tokens: Tensor, *, device: str) -> dict[str, float]:
    """The source rounded to a grid, without training."""
    model = source.load(torch.float32, device)
    attach(model, GRIDS[grid])
    merge(model)
    return _measure(model, tokens, device, source.load(torch.float32, device))


@torch.no_grad()
def _measure(
    model: PreTrainedModel, tokens: Tensor, device: str, reference: PreTrainedModel | None
) -> dict[str, float]:
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    lost = divergence = same = count = 0.0
    for part in windows.split(ROWS):  # type: ignore[no-untyped-call]
        ids = part.to(device)
        following = ids[:, WINDOW // 2 :]
        q = _log_probs(model, ids)
        lost -= float(q.gather(-1, following[..., None]).sum())
        count += following.numel()
        if reference is not None:
            p = _log_probs(reference, ids)
            divergence += float((p.exp() * (p - q)).sum())
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
    found = {"perplexity": math.exp(lost / count), "tokens": count}
    return found if reference is None else found | {"kl": divergence / count, "top1": same / count}


def _log_probs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of the second half's tokens, (rows, WINDOW / 2, vocabulary)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, WINDOW // 2 - 1 : -1]
    return F.log_softmax(logits.float(), -1)
