"""alight show"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from alight.artifact import SOURCE, Artifact
from alight.cli.describe import artifact_json
from alight.cli.output import (
    AsJson,
    complete_model,
    console,
    human_bytes,
    human_count,
    human_time,
    print_facts,
    print_json,
    table,
)
from alight.exported import MARKS, read_exported
from alight.store import Store


def command(
    name: Annotated[
        str, typer.Argument(help="A model of the store.", metavar="NAME", autocompletion=complete_model)
    ],
    json: AsJson = False,
) -> None:
    """Show what a model is: its size, context, licence, source and files.

    Example: alight show smollm2
    """
    artifact = Store().get(name)
    if json:
        print_json(_everything(artifact))
    else:
        _print(artifact)


def _everything(artifact: Artifact) -> dict[str, Any]:
    files = [
        {"path": x.path, "size": x.size, "digest": x.digest, "file": str(artifact.files[x.path])}
        for x in artifact.layers
    ]
    return {**artifact_json(artifact), **_header(artifact), "files": files, "report": artifact.report}


def _header(artifact: Artifact) -> dict[str, Any]:
    """What only the model's own files say."""
    if artifact.format in MARKS:
        about = read_exported(artifact.files)
        return {
            "trained_context": about.trained_context or None,
            "layers": about.layers or None,
            "chat_template": about.chat_template,
        }
    if artifact.format != "gguf":
        return {}
    header = artifact.header()
    return {
        "trained_context": header.get("context_length"),
        "layers": header.get("block_count"),
        "chat_template": "tokenizer.chat_template" in header.metadata,
    }


def _print(artifact: Artifact) -> None:
    about = artifact.description
    header = _header(artifact)
    facts = {
        "name": artifact.name,
        "title": about.title,
        "architecture": about.architecture,
        "parameters": human_count(about.parameters),
        "format": f"{about.format} {about.quantization}".strip(),
        "size": human_bytes(artifact.size),
        "context": f"{header['trained_context']} tokens" if header.get("trained_context") else "",
        "chat": {True: "yes", False: "no chat template: it only completes text"}.get(
            header.get("chat_template", ""), ""
        ),
        "licence": about.licence,
        "source": artifact.annotations.get(SOURCE, ""),
        "modified": human_time(artifact.modified),
        "digest": artifact.digest,
        "lineage": artifact.lineage,
        "report": _report_line(artifact.report),
    }
    print_facts(facts)
    console.print()
    files = table("FILE", "SIZE", right=("SIZE",))
    for layer in artifact.layers:
        files.add_row(Text(layer.path), human_bytes(layer.size))
    console.print(files)


def _report_line(report: dict[str, Any] | None) -> str:
    return str(report.get("reason") or "--json prints it") if report else ""
