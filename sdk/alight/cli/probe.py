"""alight probe"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from alight import devices
from alight.cli.output import AsJson, console, err, human_bytes, print_facts, print_json, table


def command(
    json: AsJson = False,
    known: Annotated[bool, typer.Option("--list", help="List the known boards instead.")] = False,
) -> None:
    """Measure what this machine has to run a model with.

    Takes a few seconds.

    Example: alight probe --json
    """
    if known:
        _list_boards(json)
        return
    with err.status("measuring this machine"):
        device = devices.probe()
    if json:
        print_json(device.to_json())
    else:
        _print(device)


def _list_boards(json: bool) -> None:
    boards = [devices.profile(id) for id in devices.profiles()]
    if json:
        print_json([board.to_json() for board in boards])
        return
    rows = table("BOARD", "NAME", "MEMORY", "BANDWIDTH", right=("MEMORY", "BANDWIDTH"))
    for board in boards:
        name = board.name if len(board.name) <= 30 else board.name[:29] + "…"
        rows.add_row(*map(Text, (board.id, name, _gib(board.memory_bytes), _speed(board))))
    console.print(rows)


def _speed(board: devices.Device) -> str:
    """The bandwidth that decoding sees: the accelerator's, where there is one."""
    fastest = max([board.bandwidth, *(a.bandwidth or 0 for a in board.accelerators)])
    return f"{human_bytes(fastest)}/s"


def _gib(count: int) -> str:
    """Memory is sold in powers of two: a board of "16 GB" has 16 GiB."""
    return f"{count / 2**30:.1f} GiB"


def _print(device: devices.Device) -> None:
    facts = {
        "device": device.name,
        "processor": f"{device.arch}, {device.cores} cores for computing",
        "instructions": " ".join(device.instructions),
        "memory": f"{_gib(device.memory_bytes)}, {_gib(device.available_bytes)} of it free for models",
        "bandwidth": f"{human_bytes(device.bandwidth)}/s",
        "arithmetic": f"{device.int8_ops / 1e9:,.0f} Gop/s int8, {device.flops / 1e9:,.0f} Gflop/s float32",
        "temperature": "" if device.temperature is None else f"{device.temperature:.0f} °C",
    }
    for accelerator in device.accelerators:
        memory = _gib(accelerator.memory_bytes) if accelerator.memory_bytes else "shares the memory"
        facts[f"{accelerator.kind} device"] = f"{accelerator.name}, {memory}"
    print_facts(facts)
