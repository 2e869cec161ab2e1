"""Matrices, embeddings and norms of a decoder, whatever the mode and the machine.

On a CPU the activations are float32, whatever the mode: its float16 is a way to store. On a GPU they are the mode's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.target import Target

from alight_converters.compile_mlc.architecture import Quantization
from alight_converters.compile_mlc.kernels.linear import GROUP, PER_WORD, ZERO, linear4, linear_float


@dataclass(frozen=True)
class Setting:
    """What the layers of one library share."""

    quantization: Quantization
    target: Target

    @property
    def cpu(self) -> bool:
        return str(self.target.kind.name) == "llvm"

    @property
    def dtype(self) -> str:
        """Of what is stored: norms, scales, embeddings, the KV cache."""
        return self.quantization.dtype

    @property
    def activations(self) -> str:
        return "float32" if self.cpu else self.dtype


def cast(x: Tensor, dtype: str) -> Tensor:
    return x if x.dtype == dtype else op.astype(x, dtype)


class Weights(nn.Module):  # type: ignore[misc]
    """A matrix (rows, columns) in the mode's form."""

    def __init__(self, rows: int, columns: int, setting: Setting) -> None:
        super().__init__()
        self.rows, self.columns, self.setting = rows, columns, setting
        if setting.quantization.four_bits:
            self.q_weight = nn.Parameter((rows, columns // PER_WORD), "uint32")
            self.q_scale = nn.Parameter((rows, columns // GROUP), setting.dtype)
        else:
            self.weight = nn.Parameter((rows, columns), setting.dtype)

    @property
    def tensors(self) -> list[Any]:
        return [self.q_weight, self.q_scale] if self.setting.quantization.four_bits else [self.weight]

    def product(self, x: Tensor, out_type: str) -> Tensor:
        """x (batch, tokens, columns) times the transposed matrix."""
        batch, tokens, _ = x.shape
        if not self.setting.cpu:
            weight = self._dequantized() if self.setting.quantization.four_bits else self.weight
            return op.matmul(x, op.permute_dims(weight), out_dtype=out_type)
        if self.setting.quantization.four_bits:
            kernel = linear4(self.rows, self.columns, self.setting.dtype)
        else:
            kernel = linear_float(self.rows, self.columns, self.setting.dtype)
        flat = op.reshape(x, (batch * tokens, self.columns))
        out = Tensor.placeholder((batch * tokens, self.rows), "float32")
        return op.reshape(
            op.tensor_ir_op(kernel, "linear", [flat, *self.tensors], out), (batch, tokens, self.rows)
        )

    def take(self, ids: Tensor) -> Tensor:
        """Rows by number: (tokens,) -> (tokens, columns), in the mode's type."""
        if not self.setting.quantization.four_bits:
            return op.take(self.weight, ids, axis=0)

        def rows(numbers: Any, words: Any, scales: Any) -> Any:
            return te.compute(
                (numbers.shape[0], self.columns),
                lambda i, k: _element(words, scales, numbers[i], k, self.setting.dtype),
                name="take_rows",
            )

        return op.tensor_expr_op(rows, "take_rows", [ids, *self.tensors])

    def _dequantized(self) -> Tensor:
        def all_of_it(words: Any, scales: Any) -> Any:
            return te.compute(
                (self.rows, self.columns),
                lambda n, k: _element(words, scales, n, k, self.setting.dtype),
                name="dequantize",
            )

        return op.tensor_expr_op(all_of_it, "dequantize", self.tensors)


def _element(words: Any, scales: Any, n: Any, k: Any, dtype: str) -> Any:
    digit = (words[n, k // PER_WORD] >> (k % PER_WORD * 4).astype("uint32")) & tirx.const(15, "uint32")
    return (digit.astype(dtype) - tirx.const(ZERO, dtype)) * scales[n, k // GROUP]


class Linear(Weights):
    """A matrix with or without a bias, from activations to activations."""

    def __init__(self, rows: int, columns: int, setting: Setting, *, bias: bool = False) -> None:
        super().__init__(rows, columns, setting)
        self.bias = nn.Parameter((rows,), setting.dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.setting.activations)
        return y if self.bias is None else y + cast(self.bias, self.setting.activations)


class Norm(nn.Module):  # type: ignore[misc]
    """Root mean square norm (Zhang and Sennrich, arXiv:1910.07467) over the last axis."""

    def __init__(self, width: int, epsilon: float, setting: Setting) -> None:
        super().__init__()
        self.weight = nn.Parameter((width,), setting.dtype)
        self.epsilon, self.setting = epsilon, setting

    def forward(self, x: Tensor) -> Tensor:
        return op.rms_norm(x, cast(self.weight, x.dtype), [-1], self.epsilon)
