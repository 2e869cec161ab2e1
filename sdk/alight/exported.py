"""What a folder that was exported for a runtime says about itself: ONNX for onnxruntime-genai, and MLC.

Everything here comes from the small JSON files; no weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alight.errors import InvalidModelFile

# Format -> the file that its runtime reads first, and without which the folder is no such thing.
MARKS = {"onnx": "genai_config.json", "mlc": "mlc-chat-config.json"}
ENCODER = "model.onnx"


@dataclass(frozen=True, slots=True)
class Exported:
    """The sizes of an exported model. A number that no file tells is 0, and a text empty.

    Attributes:
        trained_context: tokens.
        kv_width: numbers per token and layer in the key cache (the value cache is as large).
        chat_template: whether it brings one.
    """

    format: str
    architecture: str = "unknown"
    parameters: int = 0
    quantization: str = ""
    licence: str = ""
    trained_context: int = 0
    layers: int = 0
    hidden: int = 0
    kv_width: int = 0
    vocabulary: int = 0
    chat_template: bool = False


def format_of(names: Iterable[str]) -> str | None:
    """The format of a model by its files' paths; None where it is no exported folder."""
    known = set(names)
    if form := next((form for form, mark in MARKS.items() if mark in known), None):
        return form
    # An encoder has no genai_config.json. Checkpoints may bring a graph along, and are none for that.
    return "onnx" if ENCODER in known and not any(n.endswith(".safetensors") for n in known) else None


def read_exported(files: Mapping[str, Path]) -> Exported:
    """What the files of an exported folder say.

    Args:
        files: path inside the model -> file on disk.

    Raises:
        InvalidModelFile: it is no such folder, a file is missing or damaged.
    """
    form = format_of(files)
    if form is None:
        raise InvalidModelFile(
            f"there is no {', no '.join(MARKS.values())} and no {ENCODER}",
            hint="Give a folder that was exported for ONNX Runtime or MLC.",
        )
    return _onnx(files) if form == "onnx" else _mlc(files)


def _onnx(files: Mapping[str, Path]) -> Exported:
    config = _json(files, "config.json") if "config.json" in files else {}
    if MARKS["onnx"] not in files:
        return _encoder(config)
    model = _mapping(_json(files, MARKS["onnx"]), "model", MARKS["onnx"])
    decoder = model.get("decoder")
    if not isinstance(decoder, Mapping):
        return _encoder(config)
    if (graph := decoder.get("filename", "model.onnx")) not in files:
        raise InvalidModelFile(f"{MARKS['onnx']} names {graph}, which is not there", hint="Fetch it again.")
    return Exported(
        format="onnx",
        architecture=str(config.get("model_type") or model.get("type") or "unknown"),
        parameters=_number(config, "num_parameters"),
        quantization=str(config.get("onnx_precision") or ""),
        licence=_licence(config),
        trained_context=_number(config, "max_position_embeddings") or _number(model, "context_length"),
        layers=_number(decoder, "num_hidden_layers"),
        hidden=_number(decoder, "hidden_size"),
        kv_width=_number(decoder, "num_key_value_heads") * _number(decoder, "head_size"),
        vocabulary=_number(model, "vocab_size"),
        chat_template=_has_template(files),
    )


def _encoder(config: Mapping[str, Any]) -> Exported:
    return Exported(
        format="onnx",
        architecture=str(config.get("model_type") or "unknown"),
        licence=_licence(config),
        trained_context=_number(config, "max_position_embeddings"),
        layers=_number(config, "num_hidden_layers"),
        hidden=_number(config, "hidden_size"),
        vocabulary=_number(config, "vocab_size"),
    )


def _mlc(files: Mapping[str, Path]) -> Exported:
    chat = _json(files, MARKS["mlc"])
    model = _mapping(chat, "model_config", MARKS["mlc"])
    cache = _json(files, "tensor-cache.json")
    missing = [r["dataPath"] for r in _records(cache) if r["dataPath"] not in files]
    if missing:
        raise InvalidModelFile(f"the weight file {missing[0]} is missing", hint="Fetch it again.")
    told = _mapping(cache, "metadata", "tensor-cache.json")
    size, bits = (float(told.get(key) or 0) for key in ("ParamBytes", "BitsPerParam"))
    heads = _number(model, "num_attention_heads") or 1
    width = _number(model, "head_dim") or _number(model, "hidden_size") // heads
    return Exported(
        format="mlc",
        architecture=str(chat.get("model_type") or "unknown"),
        parameters=round(8 * size / bits) if bits > 0 else 0,
        quantization=str(chat.get("quantization") or ""),
        licence=_licence(chat),
        trained_context=_number(model, "context_window_size") or _number(chat, "context_window_size"),
        layers=_number(model, "num_hidden_layers"),
        hidden=_number(model, "hidden_size"),
        kv_width=(_number(model, "num_key_value_heads") or heads) * width,
        vocabulary=_number(chat, "vocab_size") or _number(model, "vocab_size"),
        chat_template=_has_template(files),
    )


def _has_template(files: Mapping[str, Path]) -> bool:
    settings = "tokenizer_config.json"
    return "chat_template.jinja" in files or (
        settings in files and bool(_json(files, settings).get("chat_template"))
    )


def _records(cache: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    records = cache.get("records")
    if not isinstance(records, list) or not all(isinstance(r, Mapping) and "dataPath" in r for r in records):
        raise InvalidModelFile("tensor-cache.json lists no weight files", hint="Fetch it again.")
    return records


def _json(files: Mapping[str, Path], name: str) -> Mapping[str, Any]:
    if name not in files:
        raise InvalidModelFile(f"{name} is missing", hint="Give the whole folder.")
    try:
        data = json.loads(files[name].read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModelFile(f"{name} is damaged: {error}", hint="Fetch it again.") from error
    if not isinstance(data, Mapping):
        raise InvalidModelFile(f"{name} holds no mapping", hint="Fetch it again.")
    return data


def _mapping(data: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    found = data.get(key)
    if not isinstance(found, Mapping):
        raise InvalidModelFile(f"{name} has no {key!r}", hint="Fetch it again.")
    return found


def _number(data: Mapping[str, Any], key: str) -> int:
    value = data.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _licence(data: Mapping[str, Any]) -> str:
    value = data.get("license")
    return value if isinstance(value, str) else ""
