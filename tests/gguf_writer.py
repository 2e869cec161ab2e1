"""Write tiny GGUF files by hand, so that the reader is tested against bytes it did not make itself."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

F32, Q8_0 = 0, 8


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    assert isinstance(item, list)
    if isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
    if isinstance(item[0], float):
        return struct.pack("<IIQ", 9, 6, len(item)) + struct.pack(f"<{len(item)}f", *item)
    return struct.pack("<IIQ", 9, 5, len(item)) + struct.pack(f"<{len(item)}i", *item)


def gguf(
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, tuple[int, ...], int, int]] = (),
    data: bytes = b"",
    *,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """A GGUF file. Tensors are (name, shape, type, offset); the counts can be made to lie."""
    out = b"GGUF" + struct.pack(
        "<IQQ",
        3,
        len(tensors) if tensor_count is None else tensor_count,
        len(metadata) if key_count is None else key_count,
    )
    for key, item in metadata.items():
        out += string(key) + value(item)
    for name, shape, kind, offset in tensors:
        out += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + b"\0" * (-len(out) % 32) + data


def tiny() -> bytes:
    """A valid file with a name and one tensor of 64 zeros."""
    return gguf(
        {"general.architecture": "llama", "general.name": "tiny", "llama.block_count": 1},
        [("token_embd.weight", (32, 2), F32, 0)],
        bytes(256),
    )
