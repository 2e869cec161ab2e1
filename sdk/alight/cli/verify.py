"""alight verify"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from alight.cli.output import AsJson, complete_model, console, err, print_json, table
from alight.store import Problem, Store, short_name


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A model of the store; by default all.", metavar="NAME", autocompletion=complete_model
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Read every file again and compare it with its digest.

    Exit code 1: something is damaged.

    Example: alight verify
    """
    store = Store()
    names = [name] if name else store.names()
    problems: list[Problem] = []
    for each in names:
        with err.status(Text(f"reading {short_name(each)}")):
            problems += store.verify(each)
    if json:
        print_json({"models": len(names), "problems": [asdict(p) for p in problems]})
    elif problems:
        rows = table("MODEL", "FILE", "PROBLEM")
        for problem in problems:
            rows.add_row(*map(Text, (short_name(problem.model), problem.path, problem.what)))
        console.print(rows)
        err.print("Remove a damaged model and pull it again: `alight rm NAME`, `alight pull SOURCE`.")
    else:
        console.print(f"{len(names)} {'model' if len(names) == 1 else 'models'}: all files are intact")
    if problems:
        raise typer.Exit(1)
