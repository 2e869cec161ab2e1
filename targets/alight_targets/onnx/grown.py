"""A Backend on plain onnxruntime for graphs and execution providers that take no shared buffer: keys and values of
each sequence grow with every run, and each sequence runs by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alight_targets.onnx import runtime
from alight_targets.onnx.backend import OnnxBackend
from alight_targets.onnx.config import PIECE
from alight_targets.onnx.graph import Graph

if TYPE_CHECKING:
    from alight.target import FloatArray


@dataclass(frozen=True, slots=True)
class _Past:
    """Keys and values of the first `length` tokens of a sequence; never changed, so that several may share them."""

    values: tuple[
        Any, ...
    ]  # of onnxruntime, one for each name in `past`, shape (1, heads, length, head size)
    length: int


class GrownBackend(OnnxBackend):
    """A graph on any execution provider; keys and values stay in host memory."""

    def __init__(self, graph: Graph, *, context: int, slots: int) -> None:
        self._graph = graph
        self._value = runtime.onnxruntime().OrtValue.ortvalue_from_numpy
        self.details = graph.details
        self.vocabulary, self.context, self.slots = graph.config.vocabulary, context, slots
        self._pasts: dict[int, _Past] = {}
        self._empty = self._cut((), 0)

    def _cut(self, values: Sequence[Any], length: int) -> _Past:
        """The beginning of keys and values; of none, an empty one."""
        config = self._graph.config
        empty = np.zeros((1, config.kv_heads, 0, config.head_size), self._graph.kv_type)
        arrays = [v.numpy()[:, :, :length] for v in values] or [empty] * len(config.past)
        return _Past(tuple(self._value(np.ascontiguousarray(a)) for a in arrays), length)

    def add(self, sequence: int) -> None:
        self._pasts[sequence] = self._empty

    def remove(self, sequence: int) -> None:
        self._pasts.pop(sequence, None)

    def rewind(self, sequence: int, length: int) -> None:
        past = self._pasts[sequence]
        if length < past.length:
            self._pasts[sequence] = self._cut(past.values, length)

    def fork(self, parent: int, child: int, length: int) -> bool:
        self._pasts[child] = self._pasts[parent]
        self.rewind(child, length)
        return True

    def extend(self, sequence: int, tokens: Sequence[int]) -> FloatArray:
        for at in range(0, len(tokens), PIECE):
            part = tokens[at : at + PIECE]
            made, self._pasts[sequence] = self._run(self._pasts[sequence], part, self._graph.config.logits)
        last: FloatArray = made[-1]
        return last

    def decode(self, sequences: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        rows = np.empty((len(sequences), self.vocabulary), np.float32)
        for row, sequence, token in zip(rows, sequences, tokens, strict=True):
            row[:] = self.extend(sequence, [token])  # which is only good until the next
        return rows

    def logits(self, tokens: Sequence[int]) -> Iterator[FloatArray]:
        return self._read(tokens, self._graph.config.logits)

    def hidden(self, tokens: Sequence[int]) -> FloatArray:
        return np.concatenate(list(self._read(tokens, self._graph.config.hidden_states)))

    def _read(self, tokens: Sequence[int], output: str) -> Iterator[FloatArray]:
        past = self._empty
        for at in range(0, len(tokens), PIECE):
            made, past = self._run(past, tokens[at : at + PIECE], output)
            yield made

    def _run(self, past: _Past, tokens: Sequence[int], output: str) -> tuple[FloatArray, _Past]:
        config, binding = self._graph.config, self._graph.binding()
        for name, value in zip(config.past, past.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in config.present:
            binding.bind_output(name, "cpu")
        made = self._graph.run(binding, [tokens], [past.length], output)
        values = binding.get_outputs()[: len(config.present)]  # in the order in which they were bound
        return made[0], _Past(tuple(values), past.length + len(tokens))

    def close(self) -> None:
        self._pasts.clear()
        self._graph.close()
