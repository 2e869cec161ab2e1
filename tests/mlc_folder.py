"""Read an MLC folder back, by nothing but its own list of tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def stored(folder: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Each tensor's record and bytes, by name."""
    shards = json.loads((folder / "tensor-cache.json").read_text())["records"]
    found = {}
    for shard in shards:
        data = (folder / shard["dataPath"]).read_bytes()
        for record in shard["records"]:
            found[record["name"]] = (record, data[record["byteOffset"] :][: record["nbytes"]])
    return found


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Each tensor in the type that a runtime gives it: bfloat16 on disk is float32."""
    found = {}
    for name, (record, data) in stored(folder).items():
        if record["dtype"] == "float32":
            array = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(data, record["dtype"])
        found[name] = array.reshape(record["shape"])
    return found


def weights(folder: Path, columns: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """The tensors in float, matrices of 4 bits dequantized. `columns`, where they are no multiple of 32."""
    found = tensors(folder)
    for name in [n for n in found if n.endswith(".q_weight")]:
        module = name.removesuffix(".q_weight")
        words, scales = found.pop(name), found.pop(f"{module}.q_scale")
        integers = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
        integers = integers.reshape(len(words), -1).astype(scales.dtype) - scales.dtype.type(7)
        values = integers * np.repeat(scales, 32, axis=1)
        found[f"{module}.weight"] = values[:, : (columns or {}).get(f"{module}.weight")]
    return found
