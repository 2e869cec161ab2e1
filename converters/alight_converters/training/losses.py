"""Losses of distillation, per predicted token, and how to compute them without holding all logits at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]
CHUNK = 1 << 27  # logits in memory at once: half a gigabyte per float32 copy


@dataclass(frozen=True)
class Divergence:
    """How far the student's next-token distribution Q is from the teacher's P, in nats.

    - forward_kl: KL(P || Q) (Hinton et al. 2015). The student covers all that the teacher may say.
    - reverse_kl: KL(Q || P) (Gu et al. 2023, MiniLLM). The student keeps to what the teacher is sure of.
    - jsd: beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, the generalized Jensen-Shannon
      divergence (Agarwal et al. 2023, GKD).

    Attributes:
        temperature: softens both distributions. The loss is multiplied by its square, so that gradients
            keep their size (Hinton et al. 2015).
        beta: of jsd, between 0 and 1, both excluded.
    """

    kind: DivergenceKind = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5

    def log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities at this temperature, in float32."""
        return F.log_softmax(logits.float() / self.temperature, dim=-1)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """One loss per position, from log-probabilities of shape (positions, outcomes)."""
        if self.kind == "forward_kl":
            loss = _kl(teacher, student)
        elif self.kind == "reverse_kl":
            loss = _kl(student, teacher)
        else:
            mixed = torch.logaddexp(teacher + math.log(self.beta), student + math.log(1 - self.beta))
            loss = self.beta * _kl(teacher, mixed) + (1 - self.beta) * _kl(student, mixed)
        return loss * self.temperature**2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def over_top_k(log_probs: Tensor, ids: Tensor) -> Tensor:
    """The distribution over k chosen tokens and, as one more outcome, all others together.

    Divergences between such distributions never exceed the full ones, and unlike those of renormalized top-k
    probabilities they do not ask the student for more confidence than its teacher has (Anshumann et al. 2025).

    Args:
        log_probs: (positions, vocabulary). ids: (positions, k).

    Returns:
        Log-probabilities (positions, k + 1), or (positions, k) where k is the whole vocabulary.
    """
    kept = log_probs.gather(-1, ids)
    return kept if ids.shape[-1] == log_probs.shape[-1] else with_rest(kept)


def with_rest(kept: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together."""
    rest = (1 - kept.exp().sum(-1, keepdim=True)).clamp_min(1e-7)  # about what float32 can tell from nothing
    return torch.cat([kept, rest.log()], dim=-1)


LossOfChunk = Callable[
    [Tensor, slice], Tensor
]  # logits of some positions, and which; to the sum of their losses


def through_head(
    hidden: Tensor, weight: Tensor, loss_of: LossOfChunk, *, positions: int | None = None
) -> Tensor:
    """Sum of a loss over all positions, computed from the logits of a few positions at a time.

    Gradients are computed on the way forward, so that no logits are kept or computed twice (as in Hsu et al.
    2024, Liger Kernel): the largest tensor of training is gone.

    Args:
        hidden: (positions, width), the input of the head. weight: (vocabulary, width), the head.
        positions: how many at a time.
    """
    positions = positions or max(1, CHUNK // weight.shape[0])
    if torch.is_grad_enabled():
        total: Tensor = _ThroughHead.apply(hidden, weight, loss_of, positions)  # type: ignore[no-untyped-call]
        return total
    chunks = range(0, len(hidden), positions)
    parts = [loss_of(F.linear(hidden[i : i + positions], weight), slice(i, i + positions)) for i in chunks]
    return torch.stack(parts).sum() if parts else hidden.new_zeros(())


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, loss_of: LossOfChunk, positions: int) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        head = weight.detach().requires_grad_(of_weight is not None)
        for start in range(0, len(hidden), positions):
            at = slice(start, start + positions)
            with torch.enable_grad():
                inputs = hidden[at].detach().requires_grad_()
                loss = loss_of(F.linear(inputs, head), at)
                found = torch.autograd.grad(loss, (inputs, head) if of_weight is not None else (inputs,))
            total += loss.detach()
            of_hidden[at] = found[0]
            if of_weight is not None:
                of_weight += found[1]
        ctx.save_for_backward(of_hidden, of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden * grad, None if of_weight is None else of_weight * grad, None, None
