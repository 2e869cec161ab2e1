"""Tiny checkpoints, made on the spot."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def checkpoint(folder: Path, **changes: object) -> dict[str, Path]:
    """A Llama config and one tensor; enough for everything that reads headers. Path inside -> file."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [256, 64], "data_offsets": [0, 32768]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32768))
    return {p.name: p for p in folder.iterdir()}
