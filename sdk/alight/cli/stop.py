"""alight stop"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from alight import api
from alight.cli.output import complete_model, console
from alight.cli.ps import HERE, On


def command(
    names: Annotated[
        list[str], typer.Argument(help="Models to unload.", metavar="NAME", autocompletion=complete_model)
    ],
    on: On = HERE,
) -> None:
    """Unload models from a running server, to free their memory.

    Requests that run end first. The server loads a model again when it is asked for.

    Example: alight stop smollm2
    """
    with api.connect(on) as server:
        for name in names:
            done = "stopped" if server.unload(name) else "will stop when its last request ends:"
            console.print(Text(f"{done} {name}"), soft_wrap=True)
