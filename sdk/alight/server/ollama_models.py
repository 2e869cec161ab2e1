"""Models as the Ollama API describes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alight.artifact import Artifact
from alight.chat import ChatTemplate
from alight.errors import InvalidModelFile
from alight.gguf import read_header
from alight.preset import Preset, adapters_of
from alight.server.manager import Offer
from alight.server.ollama_insert import insert_marks
from alight.server.ollama_template import insert_template
from alight.tools import can_call_tools, can_think

FOREVER = "9999-12-31T23:59:59Z"
_SHORT = 5  # values; longer lists, such as the vocabulary, are only shown where they are wanted


def listed(offer: Offer) -> dict[str, Any]:
    artifact = offer.artifact
    return {
        "name": tagged(offer.name),
        "model": tagged(offer.name),
        "modified_at": timestamp(artifact.modified if artifact else 0),
        "size": artifact.size if artifact else 0,
        "digest": artifact.digest.removeprefix("sha256:") if artifact else "",
        "details": _details(offer),
    }


def running(offer: Offer) -> dict[str, Any]:
    """A loaded model. Its size is what it takes in memory; none of that is an accelerator's, as far as we know."""
    told = listed(offer)
    del told["modified_at"]
    return told | {
        "size": offer.memory or told["size"],
        "expires_at": FOREVER if offer.expires_at is None else timestamp(offer.expires_at),
        "size_vram": 0,
        "context_length": offer.model.info.context if offer.model else 0,
    }


def shown(offer: Offer, *, verbose: bool) -> dict[str, Any]:
    artifact, preset = offer.artifact, Preset.of(offer.artifact)
    metadata: Mapping[str, Any] = {}
    told: dict[str, Any] = {}
    if artifact and artifact.format == "gguf":
        header = artifact.header()
        metadata = {**header.metadata, "general.parameter_count": header.parameters}
        if verbose:
            told["tensors"] = [
                {"name": t.name, "type": t.type, "shape": list(t.shape)} for t in header.tensors
            ]
    if projector := _projector(artifact):
        header = read_header(projector)
        told["projector_info"] = {key: _plain(value, verbose) for key, value in header.metadata.items()}
    own = offer.model.template.source if offer.model else str(metadata.get("tokenizer.chat_template", ""))
    if preset.system:
        told["system"] = preset.system
    if preset.messages:
        told["messages"] = [dict(message) for message in preset.messages]
    apart = ("tokenizer.chat_template", "general.name")  # the template has its own place
    return told | {
        "license": _licence(artifact),
        "modelfile": _modelfile(offer, preset),
        "parameters": "\n".join(f"{name:<30} {value}" for name, value in _parameters(preset)),
        "template": preset.written or preset.template or own,
        "details": _details(offer),
        "model_info": {"general.architecture": _details(offer)["family"]}
        | {key: _plain(value, verbose) for key, value in metadata.items() if key not in apart},
        "capabilities": _capabilities(offer, preset, preset.template or own, metadata),
        "modified_at": timestamp(artifact.modified if artifact else 0),
    }


def tagged(name: str) -> str:
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _details(offer: Offer) -> dict[str, Any]:
    about = offer.artifact.description if offer.artifact else None
    info = offer.model.info if offer.model else None
    family = about.architecture if about else info.architecture if info else ""
    parameters = about.parameters if about else info.parameters if info else 0
    try:
        parent = Preset.of(offer.artifact).parent
    except InvalidModelFile:  # using the model says it; the list of all is not to fail for one
        parent = ""
    return {
        "parent_model": parent,
        "format": about.format if about else "",
        "family": family,
        "families": [family],
        "parameter_size": _count(parameters),
        "quantization_level": about.quantization if about else "",
    }


def _capabilities(offer: Offer, preset: Preset, template: str, metadata: Mapping[str, Any]) -> list[str]:
    chat = ChatTemplate(template)
    able = {
        # What only embeds has a way of pooling in its header.
        "embedding" if any(key.endswith(".pooling_type") for key in metadata) else "completion": True,
        "tools": bool(template) and can_call_tools(chat),
        "insert": bool(insert_template(preset.written)) or insert_marks(offer.artifact) is not None,
        "thinking": bool(template) and can_think(chat),
        "vision": _projector(offer.artifact) is not None
        or (offer.model is not None and offer.model.info.vision),
    }
    return [name for name, can in able.items() if can]


def _projector(artifact: Artifact | None) -> Path | None:
    return artifact.projector if artifact else None


def _licence(artifact: Artifact | None) -> str:
    """The texts of the licence files; the licence's short name where there are none."""
    if artifact is None:
        return ""
    files = [path for path in sorted(artifact.files) if path.upper().startswith(("LICENSE", "LICENCE"))]
    texts = [artifact.files[path].read_text(errors="replace") for path in files]
    return "\n".join(texts) or artifact.description.licence


def _parameters(preset: Preset) -> list[tuple[str, str]]:
    """The parameters as a Modelfile has them: one line for each value."""
    lines = []
    for name, value in sorted(preset.parameters.items()):
        for one in value if isinstance(value, list) else [value]:
            lines.append((name, json.dumps(one, ensure_ascii=False)))
    return lines


def _modelfile(offer: Offer, preset: Preset) -> str:
    name = tagged(offer.name)
    lines = [
        "# Modelfile generated by alight",
        "# To build a new Modelfile based on this, replace FROM with:",
        f"# FROM {name}",
        "",
        f"FROM {preset.parent or name}",
    ]
    if offer.artifact:
        lines += [f"ADAPTER {adapter}" for adapter, _ in adapters_of(offer.artifact)]
    if template := preset.written or preset.template:
        lines.append(f'TEMPLATE """{template}"""')
    if preset.system:
        lines.append(f'SYSTEM """{preset.system}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(preset)]
    lines += [f"MESSAGE {message['role']} {message.get('content', '')}" for message in preset.messages]
    if offer.artifact and any(path.startswith("LICENSE") for path in offer.artifact.files):
        lines.append(f'LICENSE """{_licence(offer.artifact)}"""')
    return "\n".join(lines) + "\n"


def _plain(value: Any, verbose: bool) -> Any:
    """A value of GGUF metadata in JSON."""
    if isinstance(value, list):
        return [_plain(item, verbose) for item in value] if verbose or len(value) <= _SHORT else []
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _count(parameters: int) -> str:
    """134515008 as 134.52M."""
    if parameters >= 1_000_000_000:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.2f}M" if parameters >= 1_000_000 else f"{parameters / 1e3:.2f}K"
