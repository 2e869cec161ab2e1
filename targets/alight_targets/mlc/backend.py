"""A compiled MLC library as a Backend: tvm's virtual machine runs its functions over a paged KV cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alight.errors import EngineError, InvalidModelFile
from alight_targets.common.backend import Backend
from alight_targets.mlc.libraries import Library

if TYPE_CHECKING:
    from alight.target import FloatArray

_PAGE = 16  # tokens; the kernels are compiled for it
_BLOCK = 64  # rows of logits at a time, where all are wanted: bounds their memory
_BIG_CORES = 1  # tvm's name for "as many threads as told"
# Threads that are bound to cores would share one with those of the next model.
os.environ.setdefault("TVM_BIND_THREADS", "0")


class TvmBackend(Backend):
    """One model.

    Args:
        folder: of the MLC model.
        context: tokens that a sequence holds at most.
        slots: sequences at once; one more is kept for `logits`.
        threads: of the CPU.

    Raises:
        InvalidModelFile: weights and library are not of one model, or a file is damaged.
        EngineError: tvm cannot load it.
    """

    def __init__(self, folder: Path, library: Library, *, context: int, slots: int, threads: int) -> None:
        import tvm
        from tvm import relax
        from tvm_ffi import Shape

        self._tensor, self._shape = tvm.runtime.tensor, Shape
        self.context, self.slots = context, slots
        self._function = tvm.get_global_func
        # The pool belongs to this thread, and is made with its first use. By itself tvm takes half of the cores that
        # the system names, on the guess that two share one.
        os.environ["TVM_NUM_THREADS"] = str(threads)
        self._function("runtime.config_threadpool")(_BIG_CORES, threads)
        self._device = tvm.device(library.device, 0)
        try:
            machine = relax.VirtualMachine(tvm.runtime.load_module(str(library.path)), self._device)
            about = json.loads(machine["_metadata"]())
        except Exception as error:  # tvm raises what its C++ threw
            raise EngineError(
                f"tvm cannot load {library.path.name}: {_last_line(error)}", hint="Compile the model again."
            ) from error
        self._weights = self._load_weights(folder, about["params"])
        self._chunk = min(int(about["prefill_chunk_size"]), context)
        # A window reaches back from the end of each piece of a shared sequence, so such models share none.
        self._shares = not about.get("layer_window")
        self.vocabulary = _vocabulary(about)
        self.details = {"library": library.name, "device": library.device, "threads": threads}
        self._embed, self._prefill = machine["embed"], machine["prefill"]
        self._decode, self._verify = machine["batch_decode"], machine["batch_verify"]
        self._reshape = self._function("vm.builtin.reshape")
        self._begin = self._function("vm.builtin.kv_state_begin_forward")
        self._end = self._function("vm.builtin.kv_state_end_forward")
        pages = -(-context // _PAGE) * _PAGE * (slots + 1)
        sizes = (slots + 1, pages, self._chunk, _PAGE, 0)
        self._cache: Any = machine["create_tir_paged_kv_cache"](*(Shape((size,)) for size in sizes))
        self._lengths: dict[int, int] = {}

    def add(self, sequence: int) -> None:
        self._function("vm.builtin.kv_state_add_sequence")(self._cache, sequence)
        self._lengths[sequence] = 0

    def remove(self, sequence: int) -> None:
        self._function("vm.builtin.kv_state_remove_sequence")(self._cache, sequence)
        del self._lengths[sequence]

    def rewind(self, sequence: int, length: int) -> None:
        self._function("vm.builtin.kv_state_popn")(self._cache, sequence, self._lengths[sequence] - length)
        self._lengths[sequence] = length

    def fork(self, parent: int, child: int, length: int) -> bool:
        if not self._shares:
            return False
        self._function("vm.builtin.kv_state_fork_sequence")(self._cache, parent, child, length)
        self._lengths[child] = length
        return True

    def extend(self, sequence: int, tokens: Sequence[int]) -> FloatArray:
        for start in range(0, len(tokens), self._chunk):
            part = tokens[start : start + self._chunk]
            logits = self._forward(self._prefill, [sequence], [len(part)], part, (1, len(part)))
        last: FloatArray = logits[0, 0]
        return last

    def decode(self, sequences: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        ones = [1] * len(sequences)
        logits = self._forward(self._decode, sequences, ones, tokens, (len(sequences), 1))
        rows: FloatArray = logits[:, 0]
        return rows

    def logits(self, tokens: Sequence[int]) -> Iterator[FloatArray]:
        scored = self.slots  # the number after those of the requests
        self.add(scored)
        try:
            step = min(self._chunk, _BLOCK)
            for start in range(0, len(tokens), step):
                part = tokens[start : start + step]
                yield self._forward(self._verify, [scored], [len(part)], part, (1, len(part)))[0]
        finally:
            self.remove(scored)

    def close(self) -> None:
        self._cache = self._weights = None
        self._embed = self._prefill = self._decode = self._verify = None

    def _forward(
        self, function: Any, sequences: Sequence[int], lengths: Sequence[int], tokens: Sequence[int],
        shape: tuple[int, int],
    ) -> FloatArray:  # fmt: skip
        """Append tokens to sequences, so many to each; `shape` is how the function wants them."""
        ids = self._tensor(np.asarray(tokens, np.int32), self._device)
        embedded = self._embed(ids, self._weights)
        embedded = self._reshape(embedded, self._shape((*shape, embedded.shape[-1])))
        self._begin(self._cache, self._shape(tuple(sequences)), self._shape(tuple(lengths)))
        out = function(embedded, self._cache, self._weights)
        self._end(self._cache)
        for sequence, length in zip(sequences, lengths, strict=True):
            self._lengths[sequence] += length
        logits: FloatArray = out[0].numpy()
        return logits

    def _load_weights(self, folder: Path, parameters: Sequence[Any]) -> Any:
        try:
            self._function("vm.builtin.tensor_cache.load")(
                str(folder), self._device.dlpack_device_type(), self._device.index
            )
            try:
                names = [parameter["name"] for parameter in parameters]
                weights = self._function("vm.builtin.param_array_from_cache_by_name")(names)
            finally:
                self._function("vm.builtin.tensor_cache.clear")()
        except Exception as error:  # tvm raises what its C++ threw
            raise InvalidModelFile(
                f"the weights of {folder.name} cannot be loaded: {_last_line(error)}",
                hint="Fetch or build it again.",
            ) from error
        for parameter, weight in zip(parameters, weights, strict=True):
            if list(weight.shape) != parameter["shape"] or str(weight.dtype) != parameter["dtype"]:
                raise InvalidModelFile(
                    f"{parameter['name']} of {folder.name} is {weight.dtype}{list(weight.shape)}; its library wants "
                    f"{parameter['dtype']}{parameter['shape']}",
                    hint="The library is of another model or mode: build the model again.",
                )
        return weights


def _vocabulary(about: Any) -> int:
    """Columns of the logits: the rows of the embedding, the one two-dimensional tensor outside the layers."""
    return max(int(p["shape"][0]) for p in about["params"] if len(p["shape"]) == 2)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
