"""What a library has besides the decoder: the functions by which mlc_llm's engine and web-llm turn logits into tokens.

alight's own target samples for itself and calls none of them.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx
from tvm.relax.frontend import nn
from tvm.script import tirx as T

_COLDEST = 1e-6  # a temperature of 0, which picks the likeliest token
_THREADS = 256  # of a block; every GPU has as many
_HALVINGS = 8  # until one of them is left
_NO_LIMIT = 1 << 30
_TOP = 64  # of the likeliest tokens that can be sampled in a browser
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
def _likeliest(probs_: T.handle, values_: T.handle, order_: T.handle):  # type: ignore[no-untyped-def]
    """The `_TOP` greatest of each row in order, and zeros behind them. One block of threads finds one after another."""
    T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
    batch, vocabulary = T.int64(), T.int64()
    probs = T.match_buffer(probs_, (batch, vocabulary), "float32")
    values = T.match_buffer(values_, (batch, vocabulary), "float32")
    order = T.match_buffer(order_, (batch, vocabulary), "int32")
    for row in T.thread_binding(batch, "blockIdx.x"):
        for thread in T.thread_binding(_THREADS, "threadIdx.x"):
            with T.sblock("likeliest"):
                value = T.sblock_alloc_buffer((_THREADS,), "float32", scope="shared")
                token = T.sblock_alloc_buffer((_THREADS,), "int32", scope="shared")
                # Of this thread alone: (the last one found, the best of its own), values and tokens.
                near = T.sblock_alloc_buffer((2,), "float32", scope="local")
                near_token = T.sblock_alloc_buffer((2,), "int32", scope="local")
                near[0] = T.float32(2)  # above every probability
                near_token[0] = -1
                for i in T.serial((vocabulary + _THREADS - 1) // _THREADS):
                    if i * _THREADS + thread < vocabulary:
                        values[row, i * _THREADS + thread] = T.float32(0)
                        order[row, i * _THREADS + thread] = 0
                for rank in T.serial(T.min(T.int64(_TOP), vocabulary)):
                    near[1] = T.float32(-1)
                    near_token[1] = 0
                    for i in T.serial((vocabulary + _THREADS - 1) // _THREADS):
                        if i * _THREADS + thread < vocabulary:
                            j: T.let[T.int32] = T.Cast("int32", i * _THREADS + thread)
                            p: T.let[T.float32] = probs[row, j]
                            if p > near[1] and (p < near[0] or (p == near[0] and j > near_token[0])):
                                near[1] = p
                                near_token[1] = j
                    value[thread] = near[1]
                    token[thread] = near_token[1]
                    T.tvm_storage_sync("shared")
                    for halving in T.serial(_HALVINGS):
                        reach: T.let[T.int32] = T.shift_right(_THREADS // 2, halving)
                        other: T.let[T.int32] = T.min(thread + reach, _THREADS - 1)
                        theirs: T.let[T.float32] = value[other]
                        their_token: T.let[T.int32] = token[other]
                        if thread < reach and (
                            theirs > near[1] or (theirs == near[1] and their_token < near_token[1])
                        ):
                            near[1] = theirs
                            near_token[1] = their_token
                            value[thread] = theirs
                            token[thread] = their_token
                        T.tvm_storage_sync("shared")
                    near[0] = value[0]
                    near_token[0] = token[0]
                    if thread == 0:
                        values[row, rank] = near[0]
                        order[row, rank] = near_token[0]
                    T.tvm_storage_sync("shared")


def with_sampling(module: Any, *, gpu: bool, sorting: bool) -> Any:
    """Add the functions to a module.

    Args:
        gpu: whether it is compiled for one.
        sorting: also `argsort_probs` and `sample_with_top_p`, by which web-llm samples. The first sorts the 64
            likeliest tokens only: tvm's sort uses a third axis of blocks, which its WebGPU lacks.
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

    types = [relax.TensorType((batch, vocabulary), kind) for kind in ("float32", "int32")]
    with builder.function("argsort_probs", [probs]):
        with builder.dataflow():
            kernel = builder.add_func(_likeliest, "likeliest")
            out = builder.emit_output(relax.call_tir(kernel, [probs], out_ty=types))
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
                nn.op.full([batch, 1], _NO_LIMIT, "int32"),  # top k
                column(uniform, samples, "float32"),
                column(rows, samples, "int32"),
            )
            flat = relax.call_pure_packed("vm.builtin.reshape", chosen._expr, rows.ty.shape, ty_args=rows.ty)
            out = builder.emit_output(flat)
        builder.emit_func_output(out)
