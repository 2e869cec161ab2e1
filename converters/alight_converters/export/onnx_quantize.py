"""Replace the float matrices of a decoder graph by quantized ones.

A matrix of a layer becomes a MatMulNBits; the output matrix too, always with 8 bits, since its errors are
the model's errors. The embedding becomes a GatherBlockQuantized, of the output matrix's own bytes where the
two are tied. Neither has zero points, which would buy them nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from alight.errors import BadInput, EngineError
from alight_converters.export.onnx_rounding import Bytes, Floats, Grid, Rounded, by_importance, to_nearest
from alight_converters.quantize.imatrix import Imatrix

SMALLEST_BLOCK = 32
HEAD_BITS = 8
_INT8 = (
    4  # MatMulNBits' accuracy level at which activations are rounded to 8 bits: by far the fastest on CPUs
)
_MICROSOFT = "com.microsoft"

_MATRIX = re.compile(r"/model/layers\.(\d+)/(?:attn|mlp)/(\w+)/MatMul")
_HEAD, _EMBEDDING = "/lm_head/MatMul", "/model/embed_tokens/Gather"
# What the graph calls a matrix -> what GGUF calls those with the same input, fused or not.
_SAME_INPUT = {
    "qkv_proj": ("attn_qkv", "attn_q"),
    "q_proj": ("attn_qkv", "attn_q"),
    "k_proj": ("attn_qkv", "attn_k"),
    "v_proj": ("attn_qkv", "attn_v"),
    "o_proj": ("attn_output",),
    "gate_up_proj": ("ffn_up",),
    "gate_proj": ("ffn_gate", "ffn_up"),
    "up_proj": ("ffn_up",),
    "down_proj": ("ffn_down",),
}

Told = Callable[[int, int], None]


def quantize(
    model: ir.Model, grid: Grid, imatrix: Imatrix | None = None, told: Told | None = None
) -> list[str]:
    """Quantize all matrices of a float graph of onnxruntime-genai's builder, in place.

    Args:
        grid: of the matrices in the layers; blocks are halved until they divide a matrix's rows.
        imatrix: importance of each input column. With it scales are searched for, and kept in float16; without
            it each weight is rounded to the nearest, as ONNX Runtime's quantizer does.
        told: is called with matrices done and matrices in all.

    Returns:
        Names of the matrices that stay in float, because no block of 32 divides their rows.
    """
    graph = model.graph
    nodes = {_name(node): node for node in graph if _is_matrix(node)}
    whole = [name for name, node in nodes.items() if _columns(node) % SMALLEST_BLOCK]
    halves = imatrix is not None
    head = None
    for done, (name, node) in enumerate(nodes.items()):
        if name in whole:
            continue
        rows = np.ascontiguousarray(_constant(node.inputs[1]).T)
        if name == _HEAD:
            fitted = _fitting(replace(grid, bits=HEAD_BITS, symmetric=True), rows)
            head = _Stored.of(graph, "lm_head", to_nearest(rows, fitted, half_scales=halves))
            head.multiply(graph, node)
        else:
            rounded = _rounded(rows, _fitting(grid, rows), name, imatrix)
            _Stored.of(graph, name.strip("/").removesuffix("/MatMul").replace("/", "."), rounded).multiply(
                graph, node
            )
        if told:
            told(done + 1, len(nodes))
    whole += _quantize_embedding(graph, grid, head, half_scales=halves)
    RemoveUnusedNodesPass()(model)
    graph.opset_imports[_MICROSOFT] = 1
    graph.sort()
    return whole


def _is_matrix(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and bool(_name(node) == _HEAD or _MATRIX.fullmatch(_name(node)))


def _name(node: ir.Node) -> str:
    return node.name or ""


def _columns(node: ir.Node) -> int:
    return len(_constant(node.inputs[1]))


def _constant(value: ir.Value | None) -> Floats:
    if value is None or value.const_value is None:
        raise EngineError(f"the builder's graph has no weights where they belong: {value}")
    return value.const_value.numpy()


def _fitting(grid: Grid, rows: Floats) -> Grid:
    """The grid with a block that divides rows; 32 always does."""
    block = grid.block
    while rows.shape[1] % block:
        block //= 2
    return replace(grid, block=block)


def _rounded(rows: Floats, grid: Grid, name: str, imatrix: Imatrix | None) -> Rounded:
    if imatrix is None:
        return to_nearest(rows, grid)
    found = _MATRIX.fullmatch(name)
    layer, role = (found[1], found[2]) if found else ("", "")
    known = [f"blk.{layer}.{theirs}.weight" for theirs in _SAME_INPUT.get(role, ())]
    importance = next((imatrix.mean(n) for n in known if n in imatrix.sums), None)
    if importance is None or importance.shape != rows.shape[1:]:
        raise BadInput(
            f"the importance matrix has no {' and no '.join(known) or name} with {rows.shape[1]} columns",
            hint="It is of another model: make one from this checkpoint.",
        )
    return by_importance(rows, grid, importance)


@dataclass(frozen=True)
class _Stored:
    """A rounded matrix among a graph's initializers.

    Attributes:
        scales: float32, shape (rows, blocks).
    """

    rounded: Rounded
    integers: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None

    @classmethod
    def of(cls, graph: ir.Graph, name: str, rounded: Rounded) -> _Stored:
        bits = rounded.grid.bits
        scales = _initializer(graph, f"{name}.scales", rounded.scales)
        if rounded.scales.dtype == np.float16:  # the runtime casts them once, when it loads
            cast = ir.node("Cast", [scales], {"to": ir.DataType.FLOAT}, name=f"{name}.scales/Cast")
            graph.insert_before(graph[0], cast)
            scales = cast.outputs[0]
        zero = rounded.zero_points
        packed = None if zero is None else _initializer(graph, f"{name}.zeros", _packed(zero, bits))
        integers = _initializer(graph, f"{name}.integers", _packed(rounded.integers, bits))
        return cls(rounded, integers, scales, packed)

    def multiply(self, graph: ir.Graph, node: ir.Node) -> None:
        """Put a product with this matrix in the place of `node`."""
        grid, (rows, blocks, _) = self.rounded.grid, self.rounded.integers.shape
        sizes = {"K": blocks * grid.block, "N": rows, "bits": grid.bits, "block_size": grid.block}
        inputs = [node.inputs[0], self.integers, self.scales]
        inputs += [self.zero_points] if self.zero_points else []
        attributes = sizes | {"accuracy_level": _INT8}
        _replace(
            graph,
            node,
            [ir.node("MatMulNBits", inputs, attributes, domain=_MICROSOFT, name=f"{node.name}NBits")],
        )

    def gather(self, graph: ir.Graph, node: ir.Node, name: str) -> None:
        """Put rows of this matrix, dequantized, in the place of `node`, which gathers rows of a float one.
        It has no zero points.

        Its bytes stay as MatMulNBits wants them, (rows, blocks, block), so that both share them in memory, too.
        """
        grid, (rows, blocks, _) = self.rounded.grid, self.rounded.integers.shape

        def in_blocks(value: ir.Value, to: NDArray[np.int64], what: str) -> ir.Node:
            return ir.node(
                "Reshape", [value, _initializer(graph, f"{name}.{what}", to)], name=f"{name}/{what}"
            )

        scales = in_blocks(self.scales, np.array([rows, blocks, 1]), "scales_in_blocks")
        inputs = [self.integers, node.inputs[1], scales.outputs[0]]
        attributes = {"bits": grid.bits, "block_size": grid.block, "gather_axis": 0, "quantize_axis": 2}
        gathered = ir.node(
            "GatherBlockQuantized", inputs, attributes, domain=_MICROSOFT, name=f"{name}/GatherNBits"
        )
        whole = in_blocks(gathered.outputs[0], np.array([0, 0, blocks * grid.block]), "whole_rows")
        _replace(graph, node, [scales, gathered, whole])


def _quantize_embedding(graph: ir.Graph, grid: Grid, head: _Stored | None, *, half_scales: bool) -> list[str]:
    """Returns its name if it stays in float."""
    node = next(n for n in graph if _name(n) == _EMBEDDING)
    table = node.inputs[0]
    tied = table is not None and table.producer() is not None  # the transposed head
    if not tied:
        rows = _constant(table)
        if rows.shape[1] % SMALLEST_BLOCK:
            return [_name(node)]
        fitted = _fitting(replace(grid, symmetric=True), rows)
        rounded = to_nearest(rows, fitted, half_scales=half_scales)
        _Stored.of(graph, "embed_tokens", rounded).gather(graph, node, "embed_tokens")
    elif head is not None:
        head.gather(graph, node, "embed_tokens")
    else:
        return [_name(node)]
    return []


def _packed(integers: Bytes, bits: int) -> Bytes:
    """Two 4-bit integers in a byte, the first in its lower half; the last axis is filled up."""
    if bits == 8:
        return integers
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros_like(integers[..., :1])], -1)
    found: Bytes = integers[..., 0::2] | integers[..., 1::2] << np.uint8(4)
    return found


def _initializer(graph: ir.Graph, name: str, values: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, node: ir.Node, new: list[ir.Node]) -> None:
    """Put nodes in the place of one: the last gives its output, under its name."""
    old, output = node.outputs[0], new[-1].outputs[0]
    output.type, output.shape = old.type, old.shape
    graph.insert_before(node, new)
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    name, old.name = old.name, None
    output.name = name
    graph.remove(node, safe=True)
