"""Which weights of one matrix become zero, and what the others become: Wanda and SparseGPT."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alight.errors import BadInput

BLOCK = 128  # columns that SparseGPT chooses together and corrects before it goes on
GROUP, ZEROS = 4, 2  # the 2:4 pattern: two zeros in each four inputs


def wanda(weight: Tensor, squares: Tensor, sparsity: float | None) -> Tensor:
    """ "A Simple and Effective Pruning Approach for Large Language Models" (Sun et al., 2023).

    The score of a weight is |weight| x the L2 norm of its input; in each row the lowest go.

    Args:
        weight: shape (outputs, inputs).
        squares: sum over tokens of each squared input, shape (inputs,).
        sparsity: share of zeros; None for the 2:4 pattern.
    """
    scores = weight.abs() * squares.sqrt()
    if sparsity is None:
        return weight.masked_fill(_lowest_of_four(scores), 0)
    drop = scores.topk(_count(weight.shape[1], sparsity), dim=1, largest=False).indices
    return weight.scatter(1, drop, 0)


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float | None, damping: float) -> Tensor:
    """ "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot" (Frantar & Alistarh, 2023).

    Columns from left to right: weights of least error w² / [H⁻¹]² are set to zero, and the columns to the
    right take over what they did, by the inverse Hessian.

    Args:
        weight: shape (outputs, inputs).
        hessian: sum over tokens of input · inputᵀ, shape (inputs, inputs).
        sparsity: share of zeros; None for the 2:4 pattern.
        damping: added to the Hessian's diagonal, as a share of its mean.

    Raises:
        BadInput: the Hessian has no inverse.
    """
    weight = weight.clone()
    inverse = _inverse_factor(hessian, damping)
    weight[:, hessian.diagonal() == 0] = 0  # an input that is always zero
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block, local = weight[:, start:end].clone(), inverse[start:end, start:end]
        diagonal = local.diagonal()
        errors = torch.zeros_like(block)
        if sparsity is not None:
            drop = _lowest(block.square() / diagonal.square(), _count(block.numel(), sparsity))
        else:
            drop = torch.zeros_like(block, dtype=torch.bool)
        for i in range(end - start):
            if sparsity is None and i % GROUP == 0:
                four = slice(i, i + GROUP)
                drop[:, four] = _lowest_of_four(block[:, four].square() / diagonal[four].square())
            errors[:, i] = block[:, i] * drop[:, i] / diagonal[i]
            block[:, i:] -= errors[:, i, None] * local[i, i:]
            block[drop[:, i], i] = 0  # exactly; the subtraction leaves rounding
        weight[:, start:end] = block
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:  # LinAlgError, which torch does not export
        raise BadInput(
            f"a Hessian of {len(hessian)} inputs has no inverse with damping {damping:g}",
            hint="Give more calibration text, or a larger damping.",
        ) from error
    return factor


def _count(weights: int, sparsity: float) -> int:
    """How many of them make that share, or just more. (0.7 x 10 is 7, and not the 8 that floats make it.)"""
    return math.ceil(weights * sparsity - 1e-6)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest scores."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(count, largest=False).indices] = True
    return mask.view_as(scores)


def _lowest_of_four(scores: Tensor) -> Tensor:
    """Mask of the two lowest scores in each four neighbours of a row."""
    fours = scores.reshape(len(scores), -1, GROUP)
    drop = fours.topk(ZEROS, dim=-1, largest=False).indices
    return torch.zeros_like(fours, dtype=torch.bool).scatter(-1, drop, True).flatten(1)
