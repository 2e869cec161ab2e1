"""alight ps"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.text import Text

from alight import api
from alight.cli.output import AsJson, console, err, human_bytes, print_json, table
from alight.cli.serve import PORT

HERE = f"http://127.0.0.1:{PORT}"

On = Annotated[
    str, typer.Option("--on", help="The server: a device's name, or an address.", metavar="NAME|URL")
]


def command(json: AsJson = False, on: On = HERE) -> None:
    """List the models that a running server has in memory, and what they do.

    Example: alight ps --on kitchen-pi
    """
    with api.connect(on) as server:
        models = server.loaded()
    if json:
        print_json(models)
        return
    if not models:
        err.print("No model is loaded. The server loads one when it is asked for.")
        return
    right = ("MEMORY", "CONTEXT", "RUNNING", "WAITING", "TOK/S")
    rows = table(
        "NAME", "STATE", "TARGET", "MEMORY", "CONTEXT", "RUNNING", "WAITING", "TOK/S", "UNTIL", right=right
    )
    for model in models:
        rows.add_row(*map(Text, _cells(model)))
    console.print(rows)


def _cells(model: dict[str, Any]) -> tuple[str, ...]:
    speed = model["tokens_per_second"]
    return (
        model["name"],
        model["state"],
        model["target"],
        human_bytes(model["memory_bytes"]) if model["memory_bytes"] else "",
        str(model["context"] or ""),
        f"{model['running']}/{model['slots']}",
        str(model["waiting"]),
        f"{speed:.1f}" if speed else "",
        _until(model["expires_at"]) if model["state"] == "loaded" else "",
    )


def _until(time: str | None) -> str:
    """When it will be unloaded, counted from now."""
    if time is None:
        return "stays"
    seconds = max((datetime.fromisoformat(time) - datetime.now(UTC)).total_seconds(), 0)
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
