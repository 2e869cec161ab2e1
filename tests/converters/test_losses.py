"""Losses against the same formulas written in NumPy, and the head in chunks against the head at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from alight_converters.training.losses import Divergence, over_top_k, through_head

Array = NDArray[np.float64]
POSITIONS, VOCABULARY = 6, 40


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Of a student and a teacher."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, POSITIONS, VOCABULARY, generator=generator) * 3
    return student, teacher


def softmax(x: torch.Tensor, temperature: float = 1.0) -> Array:
    scaled = x.double().numpy() / temperature
    e = np.exp(scaled - scaled.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def kl(p: Array, q: Array) -> Array:
    return np.asarray((p * np.log(p / q)).sum(-1))


def measured(divergence: Divergence, student: torch.Tensor, teacher: torch.Tensor) -> Array:
    return divergence(divergence.log_probs(student), divergence.log_probs(teacher)).double().numpy()


def test_divergences_are_their_formulas(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, p = map(softmax, logits)
    assert np.allclose(measured(Divergence("forward_kl"), *logits), kl(p, q), rtol=1e-5)
    assert np.allclose(measured(Divergence("reverse_kl"), *logits), kl(q, p), rtol=1e-5)
    for beta in (0.1, 0.5, 0.9):
        m = beta * p + (1 - beta) * q
        expected = beta * kl(p, m) + (1 - beta) * kl(q, m)
        assert np.allclose(measured(Divergence("jsd", beta=beta), *logits), expected, rtol=1e-4)


def test_jsd_tends_to_forward_kl_for_small_beta_and_to_reverse_kl_for_large(
    logits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Agarwal et al. 2023: the limits of JSD / beta and JSD / (1 - beta)."""
    student, teacher = (x.double() / 3 for x in logits)
    q, p = softmax(student), softmax(teacher)

    def jsd(beta: float) -> Array:
        logs = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        return Divergence("jsd", beta=beta)(*logs).numpy()

    assert np.allclose(jsd(1e-4) / 1e-4, kl(p, q), rtol=0.02)
    assert np.allclose(jsd(1 - 1e-4) / 1e-4, kl(q, p), rtol=0.02)


def test_temperature_softens_both_and_scales_by_its_square(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, p = (softmax(x, 2.5) for x in logits)
    assert np.allclose(measured(Divergence(temperature=2.5), *logits), 2.5**2 * kl(p, q), rtol=1e-4)


def test_at_high_temperature_gradients_keep_their_size(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Hinton et al. 2015: that is what the square is for. In the limit it is matching centred logits."""
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    divergence = Divergence(temperature=1000.0)
    divergence(divergence.log_probs(student), divergence.log_probs(teacher)).sum().backward()
    difference = (student - teacher).detach()
    limit = (difference - difference.mean(-1, keepdim=True)) / VOCABULARY
    assert torch.allclose(student.grad, limit, atol=0.01 * float(limit.abs().max()))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_top_k_is_exact_for_the_whole_vocabulary_and_a_lower_bound_otherwise(
    logits: tuple[torch.Tensor, torch.Tensor], kind: str
) -> None:
    divergence = Divergence(kind)  # type: ignore[arg-type]
    student, teacher = map(divergence.log_probs, logits)
    full = divergence(student, teacher)
    before = torch.zeros_like(full)
    for k in (1, 4, 16, VOCABULARY):
        ids = teacher.topk(k).indices
        part = divergence(over_top_k(student, ids), over_top_k(teacher, ids))
        assert bool((part >= before - 1e-5).all()), "more tokens never show less of the difference"
        assert bool((part <= full + 1e-5).all())
        before = part
    assert torch.allclose(before, full, rtol=1e-5)


@pytest.mark.parametrize("positions", [1, 4, POSITIONS, 100])
def test_the_head_in_chunks_has_the_loss_and_gradients_of_the_head_at_once(positions: int) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(POSITIONS, 8, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, 8, generator=generator, requires_grad=True)
    target = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)

    expected = 2 * F.cross_entropy(hidden @ weight.T, target, reduction="sum")
    gradients = torch.autograd.grad(expected, (hidden, weight))
    found = 2 * through_head(
        hidden,
        weight,
        lambda logits, at: F.cross_entropy(logits, target[at], reduction="sum"),
        positions=positions,
    )
    assert torch.allclose(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, (hidden, weight)), gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(POSITIONS, 8, requires_grad=True)
    weight = torch.randn(VOCABULARY, 8)
    through_head(hidden, weight, lambda logits, at: logits.logsumexp(-1).sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is None
