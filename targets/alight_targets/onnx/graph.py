"""A decoder graph in plain onnxruntime: its session, and one run of it with keys and values bound in place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alight.errors import InvalidModelFile, Unsupported
from alight_targets.onnx import runtime
from alight_targets.onnx.config import DecoderConfig
from alight_targets.onnx.runtime import CPU, Provider

if TYPE_CHECKING:
    from alight.target import FloatArray

log = logging.getLogger("alight.onnx")

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
          "tensor(int32)": np.int32}  # fmt: skip


def open_session(graph: Path, provider: Provider, threads: int) -> Any:
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
        session = ort.InferenceSession(str(graph), options, providers=wanted)
    except Exception as error:  # its exceptions have no common base
        raise InvalidModelFile(f"onnxruntime cannot load {graph.name}: {error}") from error
    if provider.full not in session.get_providers():  # onnxruntime goes on without one that does not start
        log.warning("%s does not start, so the model runs on the CPU", provider.full)
    return session


def fallback(session: Any, provider: Provider) -> dict[str, Any]:
    """What people are told of a session that does not run where it was meant to."""
    if provider.full in session.get_providers():
        return {}
    return {"provider": CPU.name, "note": f"{provider.full} did not start"}


class Graph:
    """
    Attributes:
        kv_type: of the numbers in the KV cache.
        details: for people.

    Raises:
        InvalidModelFile: onnxruntime does not take the graph. Unsupported: it has an input that is not known here.
    """

    def __init__(self, config: DecoderConfig, provider: Provider, threads: int) -> None:
        self.config = config
        self._session = open_session(config.graph, provider, threads)
        self.details = fallback(self._session, provider)
        self._inputs = {i.name: _type(i) for i in self._session.get_inputs()}
        self._outputs = {o.name: _type(o) for o in self._session.get_outputs()}
        self._logits: NDArray[Any] = np.empty(0, np.float32)
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
            output: to return, in float32, shape (sequences, tokens, columns). Logits are only good until the next
                run: fresh memory for each would cost more than a twentieth of a step.
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
        if output == config.logits:
            made = self._room_for_logits(*ids.shape)
        else:
            made = np.empty((*ids.shape, config.hidden), self._outputs[output])
        binding.bind_output(output, "cpu", 0, made.dtype.type, made.shape, made.ctypes.data)
        self._session.run_with_iobinding(binding)
        return made.astype(np.float32, copy=False)

    def _room_for_logits(self, sequences: int, tokens: int) -> NDArray[Any]:
        vocabulary = self.config.vocabulary
        count = sequences * tokens * vocabulary
        if len(self._logits) < count:
            self._logits = np.empty(count, self._outputs[self.config.logits])
        return self._logits[:count].reshape(sequences, tokens, vocabulary)

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
