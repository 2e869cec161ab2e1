"""A tiny random vision projector for the tiny model, and PNG files made by hand."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from tiny_model import HIDDEN, written

WIDTH, HEADS, FFN = 32, 4, 64
SIZE, PATCH = 28, 7  # pixels: 16 patches


def tiny_projector(
    path: Path, *, kind: str = "mlp", seed: int = 2, hidden: int = HIDDEN, size: int = SIZE
) -> Path:
    """Write a projector to `path`.

    Args:
        kind: "mlp" (LLaVA: 16 tokens an image), "gemma3" (16 tokens that see each other, between marks) or
            "qwen2vl_merger" (for a model with M-RoPE: 4 by 4 tokens at 4 positions).
        hidden: the width of the language model.
        size: pixels of a side, for the first two kinds; each 7 by 7 of them are a token.
    """
    size, patch = (56, PATCH) if kind == "qwen2vl_merger" else (size, PATCH)
    metadata: dict[str, object] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": kind,
        "clip.use_gelu": True,
        "clip.vision.image_size": size,
        "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": WIDTH,
        "clip.vision.feed_forward_length": FFN,
        "clip.vision.block_count": 2,
        "clip.vision.projection_dim": hidden,
        "clip.vision.attention.head_count": HEADS,
        "clip.vision.attention.layer_norm_epsilon": 1e-5,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }
    shapes: dict[str, tuple[int, ...]] = {"v.patch_embd.weight": (WIDTH, 3, patch, patch)}
    if kind != "qwen2vl_merger":
        shapes["v.position_embd.weight"] = ((size // patch) ** 2, WIDTH)
    for i in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes |= {f"v.blk.{i}.{name}.weight": (WIDTH, WIDTH), f"v.blk.{i}.{name}.bias": (WIDTH,)}
        for name in ("ln1", "ln2"):
            shapes |= {f"v.blk.{i}.{name}.weight": (WIDTH,), f"v.blk.{i}.{name}.bias": (WIDTH,)}
        shapes |= {f"v.blk.{i}.ffn_up.weight": (FFN, WIDTH), f"v.blk.{i}.ffn_down.weight": (WIDTH, FFN)}
        shapes |= {f"v.blk.{i}.ffn_up.bias": (FFN,), f"v.blk.{i}.ffn_down.bias": (WIDTH,)}
    if kind == "mlp":
        shapes |= {"mm.0.weight": (hidden, WIDTH), "mm.0.bias": (hidden,)}
        shapes |= {"mm.2.weight": (hidden, hidden), "mm.2.bias": (hidden,)}
    elif kind == "gemma3":
        metadata["clip.vision.projector.scale_factor"] = 1
        shapes |= {"mm.input_projection.weight": (WIDTH, hidden), "mm.soft_emb_norm.weight": (WIDTH,)}
    elif kind == "qwen2vl_merger":
        shapes["v.patch_embd.weight.1"] = (WIDTH, 3, patch, patch)
        shapes |= {"mm.0.weight": (4 * WIDTH, 4 * WIDTH), "mm.0.bias": (4 * WIDTH,)}
        shapes |= {"mm.2.weight": (hidden, 4 * WIDTH), "mm.2.bias": (hidden,)}
        shapes |= {"v.post_ln.weight": (WIDTH,), "v.post_ln.bias": (WIDTH,)}
    return written(path, metadata, shapes, np.random.default_rng(seed))


def png(seed: int, *, side: int = SIZE) -> bytes:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND")
    )


def _chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
