"""How much a model's predictions change when single weights do.

To second order, KL(model || model with W + D) per token is half of the sum of F_ij * D_ij^2 over the weights,
F being the diagonal of the Fisher information (its other entries are taken as zero). For a matrix that is
the mean squared gradient of output i times the mean squared input j, where the loss is that of tokens drawn
from the model's own predictions. One backward pass gives it for all matrices: no labels are needed, and no
matrix is quantized on its own. (LeCun et al. 1989, "Optimal Brain Damage"; the factors as in Martens and
Grosse 2015, arXiv 1503.05671.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.memory import out_of_memory_is
from alight_converters.passes import Progress, silent
from alight_converters.quantize.imatrix import Imatrix, matrix_names

Floats = NDArray[np.float32]
_LOOKUP = "lookup"  # the embedding as it is read, whose factors are those of its output


@dataclass(frozen=True)
class Fisher:
    """The Fisher diagonal of one matrix, as products of a row's and a column's factor.

    Attributes:
        terms: (row factors, column factors): one pair, two for an embedding that is also the head.
    """

    terms: tuple[tuple[Floats, Floats], ...]

    def kl(self, change: Floats) -> float:
        """KL divergence per token, in nats, that this change of the matrix, (rows, columns), would cause."""
        squares = np.square(change)
        return 0.5 * sum(float(rows @ (squares @ columns)) for rows, columns in self.terms)


def measure(
    checkpoint: Checkpoint,
    calibration: Calibration,
    imatrix: Imatrix,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Fisher]:
    """The Fisher diagonal of all matrices and the embedding, by GGUF tensor name."""
    model: Any = checkpoint.load(device=device).requires_grad_(False)
    names = matrix_names(checkpoint)
    head = names.pop(checkpoint.family.head)
    squares: dict[str, torch.Tensor] = {}

    def add(name: str, gradients: torch.Tensor) -> None:
        here = gradients.float().square().flatten(0, -2).sum(0, dtype=torch.float64)
        squares[name] = squares[name] + here if name in squares else here

    def see(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda _module, _of_inputs, of_outputs: add(name, of_outputs[0])

    for module, name in names.items():
        model.get_submodule(module).register_full_backward_hook(see(name))
    generator = torch.Generator(device).manual_seed(seed)
    rows = calibration.rows
    length = rows.shape[1]
    for number, row in enumerate(rows):
        with out_of_memory_is(
            f"the gradient of a row of {length} tokens",
            f"Rows are taken one by one: try calibration.length {length // 2}, or a device with more memory.",
        ):
            embedded = model.get_input_embeddings()(row[None].to(device)).requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
            p = logits.detach().softmax(-1)
            drawn = p.multinomial(1, generator=generator)[:, 0]
            loss: Any = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            loss.backward()
            # For the head the mean over all tokens that could be drawn is known: it needs no gradient.
            squares[head] = squares.get(head, 0) + (p * (1 - p)).sum(0, dtype=torch.float64)
            add(_LOOKUP, embedded.grad)
        progress("sensitivity", number + 1, len(rows))

    looked_up = (_frequencies(calibration, len(squares[head])), _mean(squares.pop(_LOOKUP), calibration))
    found = {n: Fisher(((_mean(rows, calibration), imatrix.mean(n)),)) for n, rows in squares.items()}
    shared = found["token_embd.weight"].terms if "token_embd.weight" in found else ()
    return found | {"token_embd.weight": Fisher((*shared, looked_up))}


def _mean(sums: torch.Tensor, calibration: Calibration) -> Floats:
    mean: Floats = (sums / calibration.tokens).float().cpu().numpy()
    return mean


def _frequencies(calibration: Calibration, vocabulary: int) -> Floats:
    counts = torch.bincount(calibration.rows.flatten(), minlength=vocabulary)
    frequencies: Floats = (counts / calibration.tokens).float().numpy()
    return frequencies


def matrices(checkpoint: Checkpoint) -> Mapping[str, str]:
    """GGUF name -> the checkpoint's tensor, for all that a GGUF quantizes."""
    family = checkpoint.family
    found = {name: f"{module}.weight" for module, name in matrix_names(checkpoint).items()}
    return found | {"token_embd.weight": f"{family.embedding}.weight"}
