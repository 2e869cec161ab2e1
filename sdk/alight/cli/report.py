"""alight report"""

from __future__ import annotations

import os
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from alight.artifact import REPORT_PAGE, Artifact
from alight.cli.output import AsJson, complete_model, console, human_bytes, print_facts, print_json, table
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
            "speed": _where(report),
            "chosen": f"{report.get('chosen', '')}, {report.get('reason', '')}",
        }
    )
    console.print()
    here = _is_here(report)
    numbers = ("SIZE", "KL", "PPL", "TOK/S" if here else "TOK/S~", "MEMORY" if here else "MEMORY~")
    rows = table("TYPE", *numbers, right=numbers)
    for c in report.get("candidates", []):
        kl = c["quality"].get("kl_mean")
        rows.add_row(
            f"{c.get('format', 'gguf')} {c['quantization']}",
            f"{c['size'] / 1e6:,.1f} MB",
            f"{kl:.4f}" if kl is not None else "",
            f"{c['quality']['perplexity']:.2f}",
            f"{_decode(c, here):.1f}",
            human_bytes(_memory(c, here)),
            style="bold green" if c["quantization"] == report.get("chosen") else None,
        )
    console.print(rows)
    if not here:
        name = report.get("device", {}).get("name", "")
        console.print(Text(f"~ predicted for {name}; quality is measured where it was built."), style="dim")


def _is_here(report: dict[str, Any]) -> bool:
    """Whether it was built for the machine that built it, so that measured speed and memory count."""
    return bool(report.get("device", {}).get("id") == "this")


def _where(report: dict[str, Any]) -> str:
    """Of what the speeds are, and of how many streams."""
    on, device = report.get("measured_on", {}), report.get("device", {})
    machine = f"{on.get('processor', 'the machine that built it')}, {on.get('system', '')}".rstrip(", ")
    told = f"measured on {machine}" if _is_here(report) else f"predicted for {device.get('name', '')}"
    streams = report.get("limits", {}).get("streams", 1)
    return f"{told}, of each of {streams} streams" if streams > 1 else told


def _decode(candidate: dict[str, Any], here: bool) -> float:
    """Tokens/s of each stream."""
    if not here:
        return float(candidate["prediction"]["decode"])
    together = candidate.get("stream_speed")
    return float(candidate["speed"]["decode"] if together is None else together)


def _memory(candidate: dict[str, Any], here: bool) -> int:
    measured = candidate.get("memory_bytes", 0) if here else 0
    return int(measured or sum(candidate["prediction"]["memory"].values()))


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
