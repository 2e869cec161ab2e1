"""alight devices"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from alight import api
from alight.cli.output import AsJson, console, err, print_json, table


def command(
    json: AsJson = False,
    timeout: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds to look.")] = 2.0,
) -> None:
    """Find the alight servers on this network, nearest first.

    Example: alight devices --timeout 5
    """
    with err.status("looking around"):
        peers = api.discover(timeout)
    if json:
        print_json([{**asdict(p), "properties": dict(p.properties)} for p in peers])
        return
    if not peers:
        err.print("No device answered. `alight serve --host 0.0.0.0` on another one makes it visible.")
        return
    rows = table("NAME", "ADDRESS", "VERSION")
    for peer in peers:
        rows.add_row(*map(Text, (peer.name, peer.url, peer.version)))
    console.print(rows)
