"""MLC's tensor cache: `params_shard_*.bin` and their list, `tensor-cache.json`.

A shard is the bytes of tensors, one after the other. Tensors of half a shard and more have one of their own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from alight_converters.export.mlc_modes import Array, to_bfloat16

CACHE = "tensor-cache.json"
OLD_CACHE = "ndarray-cache.json"  # the same content, where runtimes of before 2025 look
SHARD = 32 << 20  # bytes; browsers cache a model file by file


class ShardWriter:
    """Writes tensors into a folder; `close` writes their list. Holds no more than one shard in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending = bytearray()
        self._records: list[dict[str, Any]] = []
        self._shards: list[dict[str, Any]] = []
        self._tensors = 0
        self._bytes = 0

    def add(self, name: str, tensor: Array) -> None:
        """float32 goes to disk as bfloat16, as mlc_llm has it: runtimes widen it again when they load it."""
        data = (to_bfloat16(tensor) if tensor.dtype == np.float32 else tensor).tobytes()
        record = {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype.name,
            "format": "f32-to-bf16",  # of all tensors; it means something for float32 alone
            "nbytes": len(data),
        }
        self._tensors += 1
        self._bytes += tensor.nbytes
        if len(self._pending) + len(data) >= SHARD:
            if 2 * len(data) >= SHARD:
                self._write(data, [record | {"byteOffset": 0}])
                return
            self._flush()
        self._records.append(record | {"byteOffset": len(self._pending)})
        self._pending += data

    def close(self, weights: int) -> None:
        """Write what is pending, and the list. `weights` is their number before quantization."""
        self._flush()
        metadata = {
            "ParamSize": self._tensors,
            "ParamBytes": float(self._bytes),  # in memory, where bfloat16 is float32 again
            "BitsPerParam": 8.0 * self._bytes / weights,
        }
        text = json.dumps({"metadata": metadata, "records": self._shards}, indent=4)
        for name in (CACHE, OLD_CACHE):
            (self._folder / name).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if self._records:
            self._write(self._pending, self._records)
            self._pending, self._records = bytearray(), []

    def _write(self, data: bytes | bytearray, records: list[dict[str, Any]]) -> None:
        name = f"params_shard_{len(self._shards)}.bin"
        (self._folder / name).write_bytes(data)
        self._shards.append({
            "dataPath": name,
            "format": "raw-shard",
            "nbytes": len(data),
            "records": records,
            "md5sum": hashlib.md5(data, usedforsecurity=False).hexdigest(),
        })  # fmt: skip
