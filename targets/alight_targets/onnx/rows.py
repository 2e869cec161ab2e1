"""A Backend on plain onnxruntime that decodes all its sequences in one run.

Each layer's keys and values are one buffer with a row for each sequence, which the graph reads and writes in place
("shared buffer" in onnxruntime-genai's words). A run takes some neighbouring rows, with a length of its own for each;
rows move so that the running sequences are neighbours. Pages of a row that were never written take no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alight_targets.onnx.backend import OnnxBackend
from alight_targets.onnx.config import PIECE
from alight_targets.onnx.graph import Graph

if TYPE_CHECKING:
    from alight.target import FloatArray


_BINDINGS = 64  # of different rows that are kept; making one takes some of a step's time


class _Buffers:
    """The KV cache of some rows, and bindings of neighbouring rows to a graph."""

    def __init__(self, graph: Graph, rows: int, length: int) -> None:
        config = graph.config
        self._graph = graph
        self._shape = (config.kv_heads, length, config.head_size)
        # Zeros are not written until they are needed, and masked values must be numbers.
        self._layers: list[NDArray[Any]] = [
            np.zeros((rows, *self._shape), graph.kv_type) for _ in config.past
        ]
        self._bindings: dict[tuple[int, int], Any] = {}

    def binding(self, first: int, rows: int) -> Any:
        """Of `rows` rows from `first` on."""
        known = self._bindings.get((first, rows))
        if known is None:
            if len(self._bindings) >= _BINDINGS:
                self._bindings.clear()
            known = self._bindings[first, rows] = self._graph.binding()
            config, shape = self._graph.config, (rows, *self._shape)
            for past, present, layer in zip(config.past, config.present, self._layers, strict=True):
                where = layer[first:].ctypes.data
                known.bind_input(past, "cpu", 0, self._graph.kv_type, shape, where)
                known.bind_output(present, "cpu", 0, self._graph.kv_type, shape, where)
        return known

    def copy(self, source: int, target: int, length: int) -> None:
        for layer in self._layers:
            layer[target, :, :length] = layer[source, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` tokens of two rows."""
        for layer in self._layers:
            kept = layer[a, :, :length].copy()
            layer[a, :, :length] = layer[b, :, :length]
            layer[b, :, :length] = kept


class RowsBackend(OnnxBackend):
    """
    Args:
        graph: one that takes a shared buffer, on the CPU.
    """

    def __init__(self, graph: Graph, *, context: int, slots: int) -> None:
        self._graph = graph
        self.details = graph.details
        self.vocabulary, self.context, self.slots = graph.config.vocabulary, context, slots
        self._buffers = _Buffers(graph, slots, context)
        self._sequences: list[int | None] = [None] * slots  # of each row
        self._lengths = [0] * slots  # of each row
        self._rows: dict[int, int] = {}  # of each sequence

    def add(self, sequence: int) -> None:
        row = self._sequences.index(None)
        self._sequences[row], self._rows[sequence], self._lengths[row] = sequence, row, 0

    def remove(self, sequence: int) -> None:
        row = self._rows.pop(sequence, None)
        if row is not None:
            self._sequences[row], self._lengths[row] = None, 0

    def rewind(self, sequence: int, length: int) -> None:
        self._lengths[self._rows[sequence]] = length

    def fork(self, parent: int, child: int, length: int) -> bool:
        self.add(child)
        row = self._rows[child]
        self._buffers.copy(self._rows[parent], row, length)
        self._lengths[row] = length
        return True

    def extend(self, sequence: int, tokens: Sequence[int]) -> FloatArray:
        row = self._rows[sequence]
        binding, logits = self._buffers.binding(row, 1), self._graph.config.logits
        for at in range(0, len(tokens), PIECE):
            part = tokens[at : at + PIECE]
            made = self._graph.run(binding, [part], self._lengths[row : row + 1], logits)
            self._lengths[row] += len(part)
        last: FloatArray = made[0, -1]
        return last

    def decode(self, sequences: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        count = len(sequences)
        first = self._gather(sequences)
        order = [self._rows[s] - first for s in sequences]
        ids = [[0]] * count
        for place, token in zip(order, tokens, strict=True):
            ids[place] = [token]
        lengths = self._lengths[first : first + count]
        made = self._graph.run(self._buffers.binding(first, count), ids, lengths, self._graph.config.logits)
        for row in range(first, first + count):
            self._lengths[row] += 1
        rows: FloatArray = made[:, 0] if order == list(range(count)) else made[order, 0]
        return rows

    def _gather(self, sequences: Sequence[int]) -> int:
        """Make the sequences neighbours; returns their first row."""
        rows = sorted(self._rows[s] for s in sequences)
        if rows[-1] - rows[0] < len(rows):
            return rows[0]
        strangers = [row for row in range(len(rows)) if row not in rows]
        for target, source in zip(strangers, [row for row in rows if row >= len(rows)], strict=True):
            self._swap(source, target)
        return 0

    def _swap(self, a: int, b: int) -> None:
        self._buffers.swap(a, b, max(self._lengths[a], self._lengths[b]))
        self._lengths[a], self._lengths[b] = self._lengths[b], self._lengths[a]
        self._sequences[a], self._sequences[b] = self._sequences[b], self._sequences[a]
        for row in (a, b):
            if (sequence := self._sequences[row]) is not None:
                self._rows[sequence] = row

    def logits(self, tokens: Sequence[int]) -> Iterator[FloatArray]:
        return self._read(tokens, self._graph.config.logits)

    def hidden(self, tokens: Sequence[int]) -> FloatArray:
        return np.concatenate(list(self._read(tokens, self._graph.config.hidden_states)))

    def _read(self, tokens: Sequence[int], output: str) -> Iterator[FloatArray]:
        """An output for every token of a text, read with buffers of its own."""
        buffers = _Buffers(self._graph, 1, len(tokens))  # which the binding does not keep
        for at in range(0, len(tokens), PIECE):
            yield self._graph.run(buffers.binding(0, 1), [tokens[at : at + PIECE]], [at], output)[0]

    def close(self) -> None:
        self._graph.close()
