"""A decoder graph in plain onnxruntime: its session, and one run of it with keys and values bound in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alight.errors import InvalidModelFile, Unsupported
from alight_targets.onnx import runtime
from alight_targets.onnx.config import DecoderConfig
from alight_targets.onnx.runtime import CPU, Provider

if TYPE_CHECKING:
    from alight.target import FloatArray

PIECE = 128  # tokens of a prompt in one run: the logits of all of them are computed and need room

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
          "tensor(int32)": np.int32}  # fmt: skip


def open_session(graph: Any, provider: Provider, threads: int) -> Any:
    """A session of onnxruntime over a file.

    Raises:
        InvalidModelFile: onnxruntime does not take it.
    """
    ort = runtime.onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors; the rest is about its own optimizer
    wanted = list(dict.fromkeys([provider.full, CPU.full]))  # the CPU takes what the provider cannot
    try:
        return ort.InferenceSession(str(graph), options, providers=wanted)
    except Exception as error:  # its exceptions have no common base
        raise InvalidModelFile(f"onnxruntime cannot load {graph.name}: {error}") from error


class Graph:
    """
    Attributes:
        kv_type: of the numbers in the KV cache.

    Raises:
        InvalidModelFile: onnxruntime does not take the graph. Unsupported: it has an input that is not known here.
    """

    def __init__(self, config: DecoderConfig, provider: Provider, threads: int) -> None:
        self.config = config
        self._session = open_session(config.graph, provider, threads)
        self._inputs = {i.name: _type(i) for i in self._session.get_inputs()}
        self._outputs = {o.name: _type(o) for o in self._session.get_outputs()}
        self.kv_type = self._inputs.get(config.past[0], np.float32)
        known = {config.input_ids, config.attention_mask, config.position_ids, *config.past}
        if strange := sorted(set(self._inputs) - known):
            raise Unsupported(
                f"the graph has the inputs {', '.join(strange)}, which plain onnxruntime is not given here",
                hint="Install onnxruntime-genai, or set ALIGHT_ONNX_ENGINE=genai.",
            )
        if missing := sorted({*config.past} - set(self._inputs)):
            raise InvalidModelFile(f"the graph has no input {missing[0]}", hint="Export the model again.")

    def binding(self) -> Any:
        return self._session.io_binding()

    def run(
        self, binding: Any, tokens: Sequence[Sequence[int]], lengths: Sequence[int], output: str
    ) -> FloatArray:
        """One run. Keys and values are bound already; see `binding`.

        Args:
            tokens: of each sequence, equally many.
            lengths: tokens that are in the KV cache of each sequence before it.
            output: to return, in float32, shape (sequences, tokens, columns).
        """
        config = self.config
        ids = np.array(tokens, self._inputs[config.input_ids])
        ends = np.array(lengths)[:, None] + ids.shape[1]
        mask_type = self._inputs[config.attention_mask]
        # One row for each sequence: as many ones as it has tokens. Attention takes its length from it.
        inputs = {
            config.input_ids: ids,
            config.attention_mask: (np.arange(ends.max()) < ends).astype(mask_type),
        }
        if config.position_ids in self._inputs:
            positions = np.array(lengths)[:, None] + np.arange(ids.shape[1])
            inputs[config.position_ids] = positions.astype(self._inputs[config.position_ids])
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        columns = config.vocabulary if output == config.logits else config.hidden
        made = np.empty((*ids.shape, columns), self._outputs[output])
        binding.bind_output(output, "cpu", 0, made.dtype.type, made.shape, made.ctypes.data)
        self._session.run_with_iobinding(binding)
        return made.astype(np.float32, copy=False)

    def close(self) -> None:
        self._session = None


def _type(node: Any) -> Any:
    found = _TYPES.get(node.type)
    if found is None:
        raise Unsupported(
            f"{node.name} of the graph is of type {node.type}",
            hint="Plain onnxruntime is used here with float32 and float16. Set ALIGHT_ONNX_ENGINE=genai.",
        )
    return found
