"""alight build"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from alight import api
from alight.builder import (
    MAX_KL,
    BuildRequest,
    BuildResult,
    Candidate,
    PlannedStage,
    RecipePlan,
    parse_bytes,
)
from alight.cli.describe import artifact_json, one_line
from alight.cli.output import AsJson, complete_model, console, err, human_bytes, print_json, progress, table
from alight.devices import Device
from alight.errors import BadInput
from alight.planner import DEFAULT_CONTEXT, Prediction


def command(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="A recipe (.yaml), a model of the store, a .gguf file, a checkpoint or adapter folder, or a source.",
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
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Also write it there as a plain folder.", metavar="DIR")
    ] = None,
    quant: Annotated[
        list[str] | None,
        typer.Option(
            help="Exactly this form, such as q4_k_m, q4_k_m+imatrix, int4 or q4f16_1; repeat for several.",
            metavar="TYPE",
        ),
    ] = None,
    min_speed: Annotated[
        float, typer.Option(help="Decode at least this fast in each stream, tokens/s.", metavar="T")
    ] = 0.0,
    max_memory: Annotated[
        str | None, typer.Option(help="Use at most this memory, such as 900MB.", metavar="BYTES")
    ] = None,
    max_kl: Annotated[
        float, typer.Option(help="Lose at most this much: mean KL, nats.", metavar="X")
    ] = MAX_KL,
    length: Annotated[
        int, typer.Option("--context", help="Tokens that each stream must hold.", min=8, metavar="N")
    ] = DEFAULT_CONTEXT,
    streams: Annotated[int, typer.Option(help="Answers written at once.", min=1, max=128)] = 1,
    text: Annotated[
        Path | None, typer.Option(help="Measure on this text file; by default on text the model writes.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to measure on.", min=32)] = 2048,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Make importance matrices from this file, folder or hf://datasets/ORG/NAME: .txt, .md, .jsonl (texts "
            "or chats), .csv or .parquet; by default from text the model writes.",
            metavar="PATH",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the text that the model writes.", min=0)] = 0,
    format: Annotated[
        str, typer.Option(help="gguf, onnx or mlc; several, such as onnx,mlc, give one artifact each.")
    ] = "gguf",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    json: AsJson = False,
) -> None:
    """Make the form of a model that fits a device, measured against its source; or run a recipe.

    Without --quant it searches among the types of GGUF: they are predicted, the promising ones built and measured,
    and the fastest that loses little enough is kept. Other formats are built in their usual type.

    Example: alight build smollm2 --for raspberry-pi-5-4gb -o smollm2-pi
    """
    if api.is_recipe(source):
        _refuse_options(context)
        asked = device if _is_given(context, "device") else None
        _recipe(Path(source), asked, name, folder, dry_run=dry_run, json=json)
        return
    limits = {
        "types": tuple(quant) if quant else None,
        "context": length,
        "streams": streams,
        "min_speed": min_speed,
        "max_memory": parse_bytes(max_memory) if max_memory else None,
        "max_kl": max_kl,
        "text": read_text(text) if text else None,
        "tokens": tokens,
        "calibration": Path(calibration) if calibration and "://" not in calibration else calibration,
        "seed": seed,
        "folder": folder,
    }
    with progress() as report:
        builder, request = api.prepare_build(
            source, device=device, name=name, format=format, progress=report, **limits
        )
    if dry_run:
        plan = builder.plan(request)
        print_json([asdict(p) for p in plan]) if json else _print_plan(plan, request.device)
        return
    if not json:
        err.print(Text(f"building {request.source.name} for {request.device.name}"), soft_wrap=True)
    with progress(steps=True) as report:
        result = builder.build(request, report)
    print_json(result_json(result)) if json else print_result(result, request)


def _recipe(
    file: Path, device: str | None, name: str | None, folder: Path | None, *, dry_run: bool, json: bool
) -> None:
    runner, options = api.prepare_recipe(device=device, name=name)
    if dry_run:
        plan = runner.plan(file, **options)
        if _speaks():
            print_json(asdict(plan)) if json else _print_recipe(plan)
        return
    with progress(steps=True) as report:
        result = runner.build(file, folder=folder, progress=report, **options)
    if not _speaks():
        return
    if json:
        print_json(result_json(result))
        return
    built_for = (result.artifact.report or {})["device"]
    _print_candidates(result, built_for["name"], measured=built_for["id"] == "this")
    for artifact in result.artifacts:
        console.print(Text(one_line(artifact)), soft_wrap=True)


def _speaks() -> bool:
    """Whether this process tells the result: of those that torchrun started, which all have it, the first one."""
    return os.environ.get("RANK", "0") == "0"


_BESIDE_A_RECIPE = {"source", "device", "name", "folder", "dry_run", "json"}


def _refuse_options(context: typer.Context) -> None:
    given = [o for o in context.params if o not in _BESIDE_A_RECIPE and _is_given(context, o)]
    if given:
        options = ", ".join(f"--{'context' if o == 'length' else o.replace('_', '-')}" for o in given)
        raise BadInput(f"{options} is given beside a recipe", hint="Write it into the recipe.")


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def result_json(result: BuildResult) -> dict[str, Any]:
    return {
        "artifact": artifact_json(result.artifact),
        "artifacts": [artifact_json(a) for a in result.artifacts],
        "candidates": [c.to_json() for c in result.candidates],
        "front": [c.quantization for c in result.front],
        "chosen": result.chosen.quantization,
        "reason": result.reason,
    }


def print_result(result: BuildResult, request: BuildRequest) -> None:
    """The candidates as a table, the choice and its reason."""
    _print_candidates(result, request.device.name, measured=request.device.id == "this")
    console.print(Text(f"chosen: {result.chosen.quantization}, {result.reason}"))
    for artifact in result.artifacts:
        console.print(Text(one_line(artifact)), soft_wrap=True)


def _print_candidates(result: BuildResult, device: str, *, measured: bool) -> None:
    """The candidates; those of the Pareto front have a star, and the chosen one is green."""
    speed, memory = ("TOK/S", "MEMORY") if measured else ("TOK/S~", "MEMORY~")
    numbers = ("SIZE", "KL", "TOP-1", "PPL", speed, memory)
    rows = table("TYPE", *numbers, right=numbers)
    several = len({c.format for c in result.candidates}) > 1
    for c in result.candidates:
        cells = _row(c, measured)
        cells[0] = f"{c.format} {cells[0]}" if several else cells[0]
        cells[0] += " *" if c in result.front else ""
        rows.add_row(*cells, style="bold green" if c is result.chosen else None)
    console.print(rows)
    if result.front:
        console.print(Text("* no other is smaller, closer and faster at once"), style="dim")
    if not measured:
        console.print(Text(f"~ predicted for {device}; quality is measured here."), style="dim")
    streams = result.chosen.prediction.streams
    if streams > 1:
        console.print(Text(f"TOK/S is that of each of {streams} streams."), style="dim")


def _row(c: Candidate, here: bool) -> list[str]:
    q = c.quality
    return [
        c.quantization + (" (source)" if c.is_source else ""),
        human_bytes(c.size),
        f"{q.kl_mean:.4f}" if q.kl_mean is not None else "",
        f"{q.top1:.1%}" if q.top1 is not None else "",
        f"{q.perplexity:.2f}",
        f"{_decode(c, here):.1f}",
        human_bytes((c.memory_bytes if here else 0) or c.prediction.memory.total),
    ]


def _decode(c: Candidate, here: bool) -> float:
    """Tokens/s of each stream: measured where the device is this machine, predicted for any other."""
    if not here:
        return c.prediction.decode
    return c.speed.decode if c.stream_speed is None else c.stream_speed


def _print_recipe(plan: RecipePlan) -> None:
    if plan.stages:
        rows = table("STAGE", "TIME", "MEMORY", right=("TIME", "MEMORY"))
        for stage in plan.stages:
            rows.add_row(stage.name, _time(stage), human_bytes(stage.memory) if stage.memory else "")
        console.print(rows)
    if plan.exports:
        _print_plan(list(plan.exports), plan.device)
    for export in plan.unpredicted:
        console.print(Text(f"{export}: known when it is made"))


def _time(stage: PlannedStage) -> str:
    if stage.cached:
        return "done before"
    if stage.seconds is None:
        return "not known"
    minutes = stage.seconds / 60
    on = f" on {stage.machine}" if stage.machine else ""
    return (f"about {stage.seconds:.0f} s" if minutes < 2 else f"about {minutes:.0f} min") + on


def _print_plan(plan: list[Prediction], device: Device) -> None:
    rows: Table = table(
        "TYPE", "WEIGHTS", "MEMORY", "TOK/S", "BOUND BY", right=("WEIGHTS", "MEMORY", "TOK/S")
    )
    for p in plan:
        weights, memory = human_bytes(p.memory.weights), human_bytes(p.memory.total)
        rows.add_row(p.quantization, weights, memory, f"{p.decode:.1f}", p.limit)
    console.print(rows)
    if plan:
        memory = human_bytes(device.available_bytes)
        each = (
            f"{plan[0].streams} streams of {plan[0].context}" if plan[0].streams > 1 else f"{plan[0].context}"
        )
        console.print(Text(f"Predicted for {device.name}, {memory} for models; context {each}."))


def read_text(path: Path) -> str:
    """A text file to measure on."""
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error}", hint="Give a plain text file.") from error
