"""alight build"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from alight import api
from alight.builder import MAX_KL, BuildRequest, BuildResult, Candidate
from alight.cli.describe import artifact_json, one_line
from alight.cli.output import AsJson, complete_model, console, err, human_bytes, print_json, progress, table
from alight.errors import BadInput
from alight.planner import DEFAULT_CONTEXT, Prediction, quant_type


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A model of the store, a .gguf file, or a source.",
            metavar="SOURCE",
            autocompletion=complete_model,
        ),
    ],
    device: Annotated[
        str,
        typer.Option("--for", help="The device: this, or a name of `alight probe --list`.", metavar="DEVICE"),
    ] = "this",
    name: Annotated[
        str | None, typer.Option("--output", "-o", help="Its name in the store.", metavar="NAME")
    ] = None,
    quant: Annotated[
        list[str] | None,
        typer.Option(help="Exactly this type, such as q4_k_m; repeat for several.", metavar="TYPE"),
    ] = None,
    min_speed: Annotated[float, typer.Option(help="Decode at least this fast, tokens/s.", metavar="T")] = 0.0,
    max_memory: Annotated[
        str | None, typer.Option(help="Use at most this memory, such as 900MB.", metavar="BYTES")
    ] = None,
    max_kl: Annotated[
        float, typer.Option(help="Lose at most this much: mean KL, nats.", metavar="X")
    ] = MAX_KL,
    context: Annotated[int, typer.Option(help="Tokens the device must hold.", min=8)] = DEFAULT_CONTEXT,
    text: Annotated[
        Path | None, typer.Option(help="Measure on this text file; by default on text the model writes.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to measure on.", min=32)] = 2048,
    format: Annotated[str, typer.Option(help="The artifact's format.")] = "gguf",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be tried.")] = False,
    json: AsJson = False,
) -> None:
    """Make the form of a model that fits a device, measured against its source.

    Without --quant, several quantization types are built, each is measured, and the fastest that loses
    little enough is kept.

    Example: alight build smollm2 --for raspberry-pi-5-4gb -o smollm2-pi
    """
    limits = {
        "types": tuple(quant_type(q) for q in quant) if quant else None,
        "context": context,
        "min_speed": min_speed,
        "max_memory": parse_bytes(max_memory) if max_memory else None,
        "max_kl": max_kl,
        "text": read_text(text) if text else None,
        "tokens": tokens,
    }
    with progress() as report:
        builder, request = api.prepare_build(
            source, device=device, name=name, format=format, progress=report, **limits
        )
    if dry_run:
        plan = builder.plan(request)
        print_json([asdict(p) for p in plan]) if json else _print_plan(plan, request)
        return
    if not json:
        err.print(Text(f"building {request.source.name} for {request.device.name}"), soft_wrap=True)
    with progress(steps=True) as report:
        result = builder.build(request, report)
    print_json(result_json(result)) if json else print_result(result, request)


def result_json(result: BuildResult) -> dict[str, Any]:
    return {
        "artifact": artifact_json(result.artifact),
        "candidates": [c.to_json() for c in result.candidates],
        "chosen": result.chosen.quantization,
        "reason": result.reason,
    }


def print_result(result: BuildResult, request: BuildRequest) -> None:
    """The candidates as a table, the choice and its reason."""
    here = request.device.id == "this"
    speed = "TOK/S" if here else "TOK/S~"
    rows = table("TYPE", "SIZE", "KL", "TOP-1", "PPL", speed, right=("SIZE", "KL", "TOP-1", "PPL", speed))
    for c in result.candidates:
        rows.add_row(*_row(c, here), style="bold green" if c is result.chosen else None)
    console.print(rows)
    if not here:
        console.print(Text(f"~ predicted for {request.device.name}; quality is measured here."), style="dim")
    console.print(Text(f"chosen: {result.chosen.quantization}, {result.reason}"))
    console.print(Text(one_line(result.artifact)), soft_wrap=True)


def _row(c: Candidate, here: bool) -> list[str]:
    q = c.quality
    return [
        c.quantization + (" (source)" if c.is_source else ""),
        human_bytes(c.size),
        f"{q.kl_mean:.4f}" if q.kl_mean is not None else "",
        f"{q.top1:.1%}" if q.top1 is not None else "",
        f"{q.perplexity:.2f}",
        f"{c.speed.decode if here else c.prediction.decode:.1f}",
    ]


def _print_plan(plan: list[Prediction], request: BuildRequest) -> None:
    rows: Table = table(
        "TYPE", "WEIGHTS", "MEMORY", "TOK/S", "BOUND BY", right=("WEIGHTS", "MEMORY", "TOK/S")
    )
    for p in plan:
        rows.add_row(
            p.quantization,
            human_bytes(p.memory.weights),
            human_bytes(p.memory.total),
            f"{p.decode:.1f}",
            p.limit,
        )
    console.print(rows)
    memory = human_bytes(request.device.available_bytes)
    console.print(
        Text(f"Predicted for {request.device.name}, {memory} for models; context {request.context}.")
    )


def parse_bytes(text: str) -> int:
    """ "900MB", "1.5GB", "2GiB" or a plain number of bytes."""
    units = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 1 << 10,
        "mib": 1 << 20,
        "gib": 1 << 30,
    }
    number = text.rstrip("bBkKmMgGiI ")
    unit = text[len(number) :].strip().lower()
    try:
        return int(float(number) * units[unit if unit in ("", "b") or unit.endswith("b") else unit + "b"])
    except (ValueError, KeyError):
        raise BadInput(
            f"{text!r} is not a size", hint="Write it as 900MB, 1.5GB or a number of bytes."
        ) from None


def read_text(path: Path) -> str:
    """A text file to measure on."""
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error}", hint="Give a plain text file.") from error
