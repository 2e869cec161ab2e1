"""What genai_config.json says of an exported decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alight.errors import InvalidModelFile

GENAI_CONFIG = "genai_config.json"
PIECE = 128  # tokens of a prompt in one run: the logits of all of them are computed and need room


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The decoder graph and its sizes.

    Attributes:
        kind: the architecture, as onnxruntime-genai calls it.
        context: tokens that it was trained for.
        shares_buffer: past and present keys may be one buffer of fixed size, which attention writes into.
        windowed: it keeps only a window of keys in some layers.
        provider: that it was exported for; empty for the CPU.
        past, present: names of the key and value tensors, of all layers, keys and values in turn.
        hidden_states: the output with the last hidden states; empty where it has none.
    """

    kind: str
    graph: Path
    vocabulary: int
    context: int
    hidden: int
    layers: int
    kv_heads: int
    head_size: int
    shares_buffer: bool
    windowed: bool
    provider: str
    input_ids: str
    attention_mask: str
    position_ids: str
    logits: str
    hidden_states: str
    past: tuple[str, ...]
    present: tuple[str, ...]

    @property
    def kv_numbers(self) -> int:
        """Numbers per token in the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_size

    @classmethod
    def read(cls, folder: Path) -> DecoderConfig:
        """
        Raises:
            InvalidModelFile: the file is missing, damaged, or says too little.
        """
        try:
            data = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
            return cls._of(data, folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidModelFile(
                f"{GENAI_CONFIG} of {folder.name} is not usable: {error!r}", hint="Export the model again."
            ) from error

    @classmethod
    def _of(cls, data: Mapping[str, Any], folder: Path) -> DecoderConfig:
        model = data["model"]
        decoder = model["decoder"]
        inputs, outputs = decoder["inputs"], decoder["outputs"]
        layers = int(decoder["num_hidden_layers"])
        graph = folder / str(decoder["filename"])
        if not graph.is_file():
            raise InvalidModelFile(f"{folder.name} has no {graph.name}", hint="Export the model again.")

        def each(key: str, value: str) -> tuple[str, ...]:
            return tuple(name % layer for layer in range(layers) for name in (key, value))

        options = decoder.get("session_options", {}).get("provider_options") or []
        return cls(
            kind=str(model.get("type", "unknown")),
            graph=graph,
            vocabulary=int(model["vocab_size"]),
            context=int(model["context_length"]),
            hidden=int(decoder["hidden_size"]),
            layers=layers,
            kv_heads=int(decoder["num_key_value_heads"]),
            head_size=int(decoder["head_size"]),
            shares_buffer=bool(data.get("search", {}).get("past_present_share_buffer", False)),
            windowed=bool(decoder.get("sliding_window")),
            provider=next((name for option in options for name in option), ""),
            input_ids=str(inputs.get("input_ids", "input_ids")),
            attention_mask=str(inputs.get("attention_mask", "attention_mask")),
            position_ids=str(inputs.get("position_ids", "position_ids")),
            logits=str(outputs.get("logits", "logits")),
            hidden_states=str(outputs.get("hidden_states", "")),
            past=each(inputs["past_key_names"], inputs["past_value_names"]),
            present=each(outputs["present_key_names"], outputs["present_value_names"]),
        )


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's graph and weight files."""
    return sum(f.stat().st_size for f in folder.iterdir() if ".onnx" in f.name and "adapter" not in f.name)
