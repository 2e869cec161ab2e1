"""alight report"""

from __future__ import annotations

import os
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from alight.artifact import REPORT_PAGE, Artifact
from alight.cli.output import AsJson, complete_model, console, print_facts, print_json, table
from alight.errors import BadInput
from alight.store import Store


def command(
    name: Annotated[
        str, typer.Argument(help="A model that was built.", metavar="NAME", autocompletion=complete_model)
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write the page with the plots to this file.", metavar="FILE")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    json: AsJson = False,
) -> None:
    """Show how a model was built: what was tried, what was measured where, and why it was chosen.

    Example: alight report smollm2-pi --open
    """
    artifact = Store().get(name)
    report = artifact.report
    if report is None:
        raise BadInput(
            f"{name!r} has no report", hint="`alight build` writes one; `alight eval` measures any model."
        )
    if html or show:
        page = _page(artifact)
        file = html or Path(tempfile.mkdtemp(prefix="alight-")) / REPORT_PAGE
        _write(file, page)
        console.print(Text(str(file)), soft_wrap=True)
        if show:
            webbrowser.open(file.absolute().as_uri())
        return
    if json:
        print_json(report)
        return
    print_facts(
        {
            "model": artifact.name,
            "source": str(report.get("source", {}).get("name", "")),
            "for": str(report.get("device", {}).get("name", "")),
            "measured on": str(report.get("quality_measured_on", "")),
            "chosen": f"{report.get('chosen', '')}, {report.get('reason', '')}",
        }
    )
    console.print()
    rows = table("TYPE", "SIZE", "KL", "PPL", "TOK/S", right=("SIZE", "KL", "PPL", "TOK/S"))
    for c in report.get("candidates", []):
        kl = c["quality"].get("kl_mean")
        rows.add_row(
            c["quantization"],
            f"{c['size'] / 1e6:,.1f} MB",
            f"{kl:.4f}" if kl is not None else "",
            f"{c['quality']['perplexity']:.2f}",
            f"{c['speed']['decode']:.1f}",
            style="bold green" if c["quantization"] == report.get("chosen") else None,
        )
    console.print(rows)


def _page(artifact: Artifact) -> bytes:
    if REPORT_PAGE not in artifact.files:
        raise BadInput(
            f"{artifact.name!r} has a report but no page",
            hint="An older alight built it: build it again, or use --json.",
        )
    return artifact.files[REPORT_PAGE].read_bytes()


def _write(file: Path, data: bytes) -> None:
    """The file appears when it is complete."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
