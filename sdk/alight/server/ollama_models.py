"""Models as the Ollama API describes them."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from alight.server.models import Offer
from alight.target import Model

FOREVER = "9999-12-31T23:59:59Z"


def listed(offer: Offer) -> dict[str, Any]:
    artifact = offer.artifact
    return {
        "name": _tagged(offer.name),
        "model": _tagged(offer.name),
        "modified_at": timestamp(artifact.modified if artifact else 0),
        "size": artifact.size if artifact else 0,
        "digest": artifact.digest.removeprefix("sha256:") if artifact else "",
        "details": _details(offer),
    }


def running(offer: Offer, model: Model) -> dict[str, Any]:
    base = listed(offer)
    del base["modified_at"]
    return base | {"expires_at": FOREVER, "size_vram": 0, "context_length": model.info.context}


def _details(offer: Offer) -> dict[str, Any]:
    about = offer.artifact.description if offer.artifact else None
    info = offer.model.info if offer.model else None
    family = about.architecture if about else info.architecture if info else ""
    parameters = about.parameters if about else info.parameters if info else 0
    return {
        "parent_model": "",
        "format": about.format if about else "",
        "family": family,
        "families": [family],
        "parameter_size": _count(parameters),
        "quantization_level": about.quantization if about else "",
    }


def shown(offer: Offer, *, verbose: bool) -> dict[str, Any]:
    artifact = offer.artifact
    info: dict[str, Any] = {"general.architecture": _details(offer)["family"]}
    if artifact and artifact.format == "gguf":
        info |= {key: _plain(value, verbose) for key, value in artifact.header().metadata.items()}
    template = offer.model.template.source if offer.model else info.get("tokenizer.chat_template", "")
    return {
        "modelfile": f"FROM {_tagged(offer.name)}",
        "parameters": "",
        "template": template,
        "license": artifact.description.licence if artifact else "",
        "details": _details(offer),
        "model_info": info,
        "capabilities": ["completion"],
        "modified_at": timestamp(artifact.modified if artifact else 0),
    }


def _plain(value: Any, verbose: bool) -> Any:
    """A value of GGUF metadata in JSON. Lists can be long (the vocabulary): only where they are wanted."""
    if isinstance(value, list):
        return [_plain(item, verbose) for item in value] if verbose else None
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tagged(name: str) -> str:
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


def _count(parameters: int) -> str:
    """134515008 as 134.52M."""
    if parameters >= 1_000_000_000:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.2f}M" if parameters >= 1_000_000 else f"{parameters / 1e3:.2f}K"


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
