"""An artifact as the verbs show it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from alight.artifact import SOURCE, Artifact
from alight.cli.output import human_bytes, human_count


def artifact_json(artifact: Artifact) -> dict[str, Any]:
    """What `alight list --json` and `alight show --json` print of a model."""
    about = artifact.description
    return {
        "name": artifact.name,
        "digest": artifact.digest,
        "size": artifact.size,
        "format": about.format,
        "quantization": about.quantization,
        "architecture": about.architecture,
        "parameters": about.parameters,
        "licence": about.licence,
        "source": artifact.annotations.get(SOURCE, ""),
        "lineage": artifact.lineage,
        "modified": datetime.fromtimestamp(artifact.modified, UTC).isoformat(timespec="seconds"),
    }


def one_line(artifact: Artifact) -> str:
    """ "smollm2: 135M parameters, gguf Q4_1, 98.9 MB"."""
    about = artifact.description
    kind = f"{about.format} {about.quantization}".strip()
    return (
        f"{artifact.name}: {human_count(about.parameters)} parameters, {kind}, {human_bytes(artifact.size)}"
    )
