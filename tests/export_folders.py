"""ONNX and MLC folders with everything that alight itself reads, and weights that are noise: for what moves and
describes them. No runtime loads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TOKENIZER = {"tokenizer.json": "{}", "tokenizer_config.json": "{}"}

GENAI = {
    "model": {
        "type": "llama",
        "context_length": 2048,
        "vocab_size": 320,
        "decoder": {
            "filename": "model.onnx",
            "head_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
        },
    }
}

MLC_CHAT = {
    "model_type": "llama",
    "quantization": "q4f32_1",
    "vocab_size": 320,
    "context_window_size": 2048,
    "model_config": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    },
}

TENSOR_CACHE = {
    "metadata": {"ParamSize": 20, "ParamBytes": 5000.0, "BitsPerParam": 4.0},
    "records": [{"dataPath": "params_shard_0.bin", "nbytes": 5000, "records": []}],
}


def onnx_folder(folder: Path) -> Path:
    _write(folder, {**TOKENIZER, "genai_config.json": GENAI})
    (folder / "model.onnx").write_bytes(os.urandom(500))
    (folder / "model.onnx.data").write_bytes(os.urandom(5000))
    return folder


def mlc_folder(folder: Path) -> Path:
    _write(folder, {**TOKENIZER, "mlc-chat-config.json": MLC_CHAT, "tensor-cache.json": TENSOR_CACHE})
    (folder / "params_shard_0.bin").write_bytes(os.urandom(5000))
    (folder / "lib").mkdir()
    (folder / "lib/x86_64.so").write_bytes(os.urandom(700))
    (folder / "lib/libraries.json").write_text("[]")
    return folder


def _write(folder: Path, files: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
