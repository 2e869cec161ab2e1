"""alight rm"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from alight.cli.output import complete_model, console, human_bytes
from alight.store import Store


def command(
    names: Annotated[
        list[str], typer.Argument(help="Models of the store.", metavar="NAME", autocompletion=complete_model)
    ],
) -> None:
    """Remove models from the store.

    Files that another model needs stay.

    Example: alight rm smollm2
    """
    store = Store()
    for name in names:  # all of them first: a wrong name removes nothing
        if name not in store:
            store.get(name)  # raises, with the nearest names
    for name in names:
        freed = store.remove(name)
        console.print(Text(f"removed {name}, {human_bytes(freed)} freed"), soft_wrap=True)
