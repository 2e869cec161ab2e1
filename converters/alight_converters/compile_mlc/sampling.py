"""What a library has besides the decoder: the functions by which mlc_llm's engine and web-llm turn logits into tokens.

alight's own target samples for itself and calls none of them.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.script import tirx as T

_COLDEST = 1e-6  # a temperature of 0, which picks the likeliest token
_THREADS = 256  # of a block; every GPU has as many
_UNLIKELY = -3.4028234663852886e38  # float32's least number


def _logit_functions(gpu: bool) -> tuple[Any, ...]:
    """The functions that change logits in place. tvm's default schedules take none of them for a GPU's, so they bind
    its threads themselves."""

    def blocks(count: Any) -> Any:
        return T.thread_binding(count, "blockIdx.x") if gpu else T.serial(count)

    def threads(count: int) -> Any:
        return T.thread_binding(count, "threadIdx.x") if gpu else T.serial(count)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def apply_logit_bias_inplace(  # type: ignore[no-untyped-def]
        logits_: T.handle, rows_: T.handle, ids_: T.handle, bias_: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        batch, vocabulary, count = T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(logits_, (batch, vocabulary), "float32")
        rows = T.match_buffer(rows_, (count,), "int32")
        ids = T.match_buffer(ids_, (count,), "int32")
        bias = T.match_buffer(bias_, (count,), "float32")
        for block in blocks((count + _THREADS - 1) // _THREADS):
            for thread in threads(_THREADS):
                with T.sblock("bias"):
                    n: T.let[T.int32] = block * _THREADS + thread
                    if n < count:
                        logits[rows[n], ids[n]] += bias[n]

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def apply_penalty_inplace(  # type: ignore[no-untyped-def]
        logits_: T.handle,
        rows_: T.handle,
        owners_: T.handle,
        ids_: T.handle,
        counts_: T.handle,
        penalties_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        batch, vocabulary, count, sequences = T.int32(), T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(logits_, (batch, vocabulary), "float32")
        rows = T.match_buffer(rows_, (sequences,), "int32")
        owners = T.match_buffer(owners_, (count,), "int32")
        ids = T.match_buffer(ids_, (count,), "int32")
        counts = T.match_buffer(counts_, (count,), "int32")
        penalties = T.match_buffer(penalties_, (sequences, 3), "float32")  # presence, frequency, repetition
        for block in blocks((count + _THREADS - 1) // _THREADS):
            for thread in threads(_THREADS):
                with T.sblock("penalty"):
                    n: T.let[T.int32] = block * _THREADS + thread
                    if n < count:
                        logits[rows[owners[n]], ids[n]] -= (
                            penalties[owners[n], 0] + T.Cast("float32", counts[n]) * penalties[owners[n], 1]
                        )
                        if logits[rows[owners[n]], ids[n]] < T.float32(0):
                            logits[rows[owners[n]], ids[n]] *= penalties[owners[n], 2]
                        else:
                            logits[rows[owners[n]], ids[n]] /= penalties[owners[n], 2]

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def apply_bitmask_inplace(logits_: T.handle, rows_: T.handle, mask_: T.handle):  # type: ignore[no-untyped-def]
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        batch, vocabulary, sequences = T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(logits_, (batch, vocabulary), "float32")
        rows = T.match_buffer(rows_, (sequences,), "int32")
        mask = T.match_buffer(mask_, (batch, (vocabulary + 31) // 32), "int32")
        for block in blocks((sequences * vocabulary + _THREADS - 1) // _THREADS):
            for thread in threads(_THREADS):
                with T.sblock("mask"):
                    n: T.let[T.int32] = block * _THREADS + thread
                    if n < sequences * vocabulary:
                        row: T.let[T.int32] = rows[n // vocabulary]
                        token: T.let[T.int32] = n % vocabulary
                        if T.bitwise_and(T.shift_right(mask[row, token // 32], token % 32), 1) == 0:
                            logits[row, token] = T.float32(_UNLIKELY)

    return apply_logit_bias_inplace, apply_penalty_inplace, apply_bitmask_inplace


@T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
def _fill(result_: T.handle, value: T.int32):  # type: ignore[no-untyped-def]
    rows = T.int32()
    result = T.match_buffer(result_, (rows, 1), "int32")
    for i in T.serial(rows):
        with T.sblock("fill"):
            n = T.axis.spatial(rows, i)
            result[n, 0] = value


def with_sampling(module: Any, *, gpu: bool, sorting: bool) -> Any:
    """Add the functions to a module.

    Args:
        gpu: whether it is compiled for one.
        sorting: also `argsort_probs` and `sample_with_top_p`, which sample where the logits are. tvm sorts on GPUs;
            engines on a CPU sample for themselves.
    """
    for function in _logit_functions(gpu):
        module[str(function.attrs["global_symbol"])] = function
    builder = relax.BlockBuilder(module)
    _add_softmax(builder)
    if sorting:
        _add_argsort(builder)
        _add_top_p(builder)
    return builder.finalize()


def _add_softmax(builder: relax.BlockBuilder) -> None:
    batch, vocabulary = tirx.Var("batch_size", "int64"), tirx.Var("vocab_size", "int64")
    logits = relax.Var("logits", relax.TensorType((batch, 1, vocabulary), "float32"))
    temperature = relax.Var("temperature", relax.TensorType((batch,), "float32"))
    with builder.function("softmax_with_temperature", [logits, temperature]):
        with builder.dataflow():
            warm = relax.op.maximum(temperature, relax.const(_COLDEST, "float32"))
            scaled = relax.op.divide(logits, relax.op.reshape(warm, (batch, 1, 1)))
            out = builder.emit_output(relax.op.nn.softmax(scaled, axis=-1))
        builder.emit_func_output(out)


def _add_argsort(builder: relax.BlockBuilder) -> None:
    batch, vocabulary = tirx.Var("batch_size", "int64"), tirx.Var("vocab_size", "int64")
    probs = relax.Var("probs", relax.TensorType((batch, vocabulary), "float32"))

    def take(values: Any, order: Any) -> Any:
        return te.compute((batch, vocabulary), lambda i, j: values[i, order[i, j]], name="take_sorted_probs")

    with builder.function("argsort_probs", [probs]):
        with builder.dataflow():
            order = builder.emit(relax.op.argsort(probs, descending=True, dtype="int32"))
            values = builder.emit_te(take, probs, order, primfunc_name_hint="take_sorted_probs")
            out = builder.emit_output((values, order))
        builder.emit_func_output(out)


def _add_top_p(builder: relax.BlockBuilder) -> None:
    batch, vocabulary = tirx.Var("batch_size", "int64"), tirx.Var("vocab_size", "int64")
    samples = tirx.Var("num_samples", "int64")
    probs = relax.Var("sorted_probs", relax.TensorType((batch, vocabulary), "float32"))
    order = relax.Var("sorted_indices", relax.TensorType((batch, vocabulary), "int32"))
    uniform = relax.Var("uniform_samples", relax.TensorType((samples,), "float32"))
    rows = relax.Var("sample_indices", relax.TensorType((samples,), "int32"))
    top_p = relax.Var("top_p", relax.TensorType((batch,), "float32"))

    def column(of: Any, count: Any, dtype: str) -> nn.Tensor:
        shape = relax.ShapeExpr([count, 1])
        return nn.wrap_nested(
            relax.call_pure_packed("vm.builtin.reshape", of, shape, ty_args=relax.TensorType(shape, dtype)),
            "column",
        )

    with builder.function("sample_with_top_p", [probs, order, uniform, rows, top_p]):
        with builder.dataflow():
            chosen = nn.sample_top_p_top_k_from_sorted_prob(
                nn.wrap_nested(probs, "sorted_probs"),
                nn.wrap_nested(order, "sorted_indices"),
                column(top_p, batch, "float32"),
                nn.tensor_ir_op(_fill, "fill", [vocabulary], nn.Tensor.placeholder([batch, 1], "int32")),
                column(uniform, samples, "float32"),
                column(rows, samples, "int32"),
            )
            flat = relax.call_pure_packed("vm.builtin.reshape", chosen._expr, rows.ty.shape, ty_args=rows.ty)
            out = builder.emit_output(flat)
        builder.emit_func_output(out)
