"""The state of a sequence as llama.cpp writes it, made fit for a context with another number of streams.

After a header, llama.cpp (`llama_kv_cache::state_write`) writes for each of a model's caches the number of
streams, and per stream its count of cells and, where there are any, their positions, keys and values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

_HEADER = 8  # bytes: a magic number and a version
_CELL = 12  # bytes: position, number of sequences (one), its number


class NotConvertible(ValueError):
    """The state has a form that this module does not know."""


def with_streams(state: bytes, streams: int) -> bytes:
    """The same keys and values for a context with so many streams.

    Raises:
        NotConvertible: cells with several positions, or no state at all.
    """
    try:
        return b"".join(_caches(_Reader(memoryview(state)), streams))
    except struct.error as error:
        raise NotConvertible(str(error)) from error


def _caches(reader: _Reader, streams: int) -> Iterator[bytes | memoryview]:
    yield reader.take(_HEADER)
    while reader.left:  # models with sliding windows have two caches
        yield struct.pack("<I", streams)
        empty = streams
        for _ in range(reader.number("<I")):
            if count := reader.number("<I"):
                yield struct.pack("<I", count)
                yield reader.take(_size_of_cells(reader, count))
                empty -= 1
        yield bytes(4 * empty)


def _size_of_cells(reader: _Reader, count: int) -> int:
    """Bytes of positions, keys and values of so many cells; the reader stays where it is."""
    start = reader.at
    if any(np.frombuffer(reader.take(_CELL * count), np.uint32)[1::3] != 1):
        raise NotConvertible("cells with more than a position and a sequence")
    transposed, layers = reader.number("<I"), reader.number("<I")
    for values in (False, True):
        for _ in range(layers):
            reader.number("<i")  # the type
            in_columns = values and transposed  # then: size of an element, and how many of them
            row = reader.number("<I") * reader.number("<I") if in_columns else reader.number("<Q")
            reader.take(row * count)
    size, reader.at = reader.at - start, start
    return size


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self.at

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise NotConvertible(f"{size} bytes wanted, {self.left} left")
        part = self._data[self.at : self.at + size]
        self.at += size
        return part
