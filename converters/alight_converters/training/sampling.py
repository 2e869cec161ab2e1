"""Text that a model writes, many rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

from alight_converters.memory import RowsAtOnce
from alight_converters.training.data import seed_of
from alight_converters.training.head import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    *,
    seed: int,
    temperature: float = 1.0,
    present: Tensor | None = None,
    stop: int | None = None,
) -> Tensor:
    """Continue prompts, sampling from the whole distribution.

    Args:
        prompts: (rows, length) tokens on the model's device, padded on the left.
        present: (rows, length), bool, False for padding; None where there is none.
        stop: end early when every row has written this token. Rows go on after it until then.

    Returns:
        (rows, length + new_tokens at most): the prompts and what follows.
    """
    generator = torch.Generator(prompts.device).manual_seed(seed)
    tokens, cache, fed = prompts, None, prompts
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    with evaluating(model), parametrize.cached():
        for _ in range(new_tokens):
            where = {} if present is None else _positions(present, fed.shape[1])
            done = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1, **where)
            cache, logits = done.past_key_values, done.logits[:, -1].float()
            fed = _pick(logits, temperature, generator)
            tokens = torch.cat([tokens, fed], dim=1)
            if present is not None:
                present = torch.cat([present, torch.ones_like(fed, dtype=torch.bool)], dim=1)
            if stop is not None:
                stopped |= fed[:, 0] == stop
                if bool(stopped.all()):
                    break
    return tokens


def sample_what_fits(
    at_once: RowsAtOnce,
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    *,
    seed: int,
    temperature: float = 1.0,
    present: Tensor | None = None,
    stop: int | None = None,
) -> Tensor:
    """`sample`, as many rows together as fit the memory. In parts, each draws with a seed of its own."""

    def in_parts(rows: int) -> Tensor:
        parts = []
        for i in range(0, len(prompts), rows):
            parts.append(
                sample(
                    model,
                    prompts[i : i + rows],
                    new_tokens,
                    seed=seed_of(seed, i) if i else seed,
                    temperature=temperature,
                    present=None if present is None else present[i : i + rows],
                    stop=stop,
                )
            )
        longest = max(part.shape[1] for part in parts)  # those that all stopped early are shorter
        return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=stop or 0) for part in parts])

    return at_once.run(in_parts)


def until_stop(tokens: Tensor, start: int, stop: int | None) -> Tensor:
    """(rows, length), bool: the tokens from `start` on, up to and with the first `stop`."""
    written = torch.zeros_like(tokens, dtype=torch.bool)
    written[:, start:] = True
    if stop is None:
        return written
    stops = (tokens == stop) & written
    return written & (stops.cumsum(1) - stops.long() == 0)


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)


def _positions(present: Tensor, fed: int) -> dict[str, Tensor]:
    positions = (present.long().cumsum(1) - 1).clamp_min(0)
    return {"attention_mask": present.long(), "position_ids": positions[:, -fed:]}
