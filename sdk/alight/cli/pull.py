"""alight pull"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from alight import api
from alight.cli.describe import artifact_json, one_line
from alight.cli.output import AsJson, console, print_json, progress


def command(
    source: Annotated[
        str, typer.Argument(help="builtin:NAME, hf://ORG/NAME, a .gguf file, a folder.", metavar="SOURCE")
    ],
    name: Annotated[str | None, typer.Option(help="Its name here; by default one from the source.")] = None,
    json: AsJson = False,
) -> None:
    """Fetch a model into the store.

    A pull that was interrupted goes on where it stopped.

    Example: alight pull builtin:smollm2
    """
    with progress() as report:
        artifact = api.pull(source, name=name, progress=report)
    if json:
        print_json(artifact_json(artifact))
    else:
        console.print(Text(one_line(artifact)), soft_wrap=True)
