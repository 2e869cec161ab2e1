"""Profiles of known boards: one TOML file per board, next to this module.

A file describes the board with the figures of its datasheet; a table under `variants` replaces what
differs for one variant, whose id is "<file>-<variant>":

    name = "Raspberry Pi 5"
    arch = "aarch64"

    [cpu]
    cores = 4                 # physical performance cores
    clock = 2.4e9             # Hz
    instructions = ["neon"]
    source = "where this is from"

    [memory]
    bytes = 8589934592
    reserve = 629145600       # bytes that the system and its services keep
    source = "…"

    [bandwidth]               # sustained bytes/s = peak × efficiency
    peak = 17.1e9
    efficiency = 0.64
    source = "…"

    [int8]                    # sustained op/s = cores × clock × per_cycle × efficiency; a multiply-add is 2
    per_cycle = 64
    efficiency = 0.16
    source = "…"

    [float32]                 # likewise, flop/s
    …

    [accelerators.gpu]        # none, or several under names of their own
    kind = "cuda"
    name = "as its driver calls it"
    memory = 8589934592       # left out: it shares the host's
    count = 1                 # left out: 1
    bandwidth = { peak = …, efficiency = …, source = "…" }
    flops = { peak = …, efficiency = …, source = "…" }    # fp16
    source = "…"

    [variants.8gb]            # may be empty
    memory.bytes = 8589934592
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from typing import Any, TypeAlias

from alight.devices.device import ACCELERATOR_KINDS, Accelerator, Device
from alight.errors import BadInput, DeviceNotFound, nearest

Table: TypeAlias = dict[str, Any]

_PEAK = {"peak": float, "efficiency": float, "source": str}
_PER_CYCLE = {"per_cycle": float, "efficiency": float, "source": str}
_BOARD = {
    "name": str,
    "arch": str,
    "cpu": {"cores": int, "clock": float, "instructions": list, "source": str},
    "memory": {"bytes": int, "reserve": int, "source": str},
    "bandwidth": _PEAK,
    "int8": _PER_CYCLE,
    "float32": _PER_CYCLE,
}
_BOARD_OPTIONAL = {"accelerators": dict}
_ACCELERATOR = {"kind": str, "name": str, "bandwidth": _PEAK, "flops": _PEAK, "source": str}
_ACCELERATOR_OPTIONAL = {"memory": int, "count": int}


def profiles() -> list[str]:
    """The ids of all profiles, sorted."""
    return sorted(_all())


def profile(id: str) -> Device:
    """The device of that id.

    Raises:
        DeviceNotFound: there is no such profile; the message names the nearest ones.
    """
    try:
        return _all()[id]
    except KeyError:
        near = nearest(id, _all())
        guess = f"Did you mean {' or '.join(near)}? " if near else ""
        hint = f"{guess}`alight probe --list` shows all profiles."
        raise DeviceNotFound(f"no device profile named {id!r}", hint=hint) from None


def known_speeds(accelerator: Accelerator, memory_bytes: int) -> tuple[Accelerator, dict[str, str]]:
    """The accelerator with the speeds that a profile has for one of the same kind and name.

    Where several have (variants of a board), the one whose host memory is nearest to `memory_bytes`.

    Returns:
        the accelerator, unchanged where none knows it, and the sources of its figures.
    """
    same = [
        (abs(device.memory_bytes - memory_bytes), device.id, device, known)
        for device in _all().values()
        for known in device.accelerators
        if (known.kind, known.name) == (accelerator.kind, accelerator.name)
    ]
    if not same:
        return accelerator, {}
    _, _, device, known = min(same, key=lambda found: found[:2])
    keys = [f"accelerators.{accelerator.name}.{figure}" for figure in ("bandwidth", "flops")]
    sources = {key: f"profile {device.id}: {device.sources[key]}" for key in keys}
    return replace(accelerator, bandwidth=known.bandwidth, flops=known.flops), sources


@functools.cache
def _all() -> dict[str, Device]:
    found: dict[str, Device] = {}
    for file in resources.files("alight.devices").iterdir():
        if file.name.endswith(".toml"):
            found.update((device.id, device) for device in parse_board(file.name, file.read_text("utf-8")))
    return found


def parse_board(file_name: str, text: str) -> list[Device]:
    """The devices that a board's TOML describes: one per variant, or one if it has no variants.

    Raises:
        BadInput: naming the file and the key that is missing, unknown or wrong.
    """
    try:
        board = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{file_name} is not TOML: {error}") from None
    stem = file_name.removesuffix(".toml")
    variants = board.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise BadInput(f"{file_name}: variants is {variants!r}", hint="It must be a table of tables.")
    if not variants:
        return [_device(stem, file_name, board)]
    return [_device(f"{stem}-{key}", file_name, _merge(board, changes)) for key, changes in variants.items()]


def _device(id: str, file_name: str, board: Table) -> Device:
    where = f"{file_name} ({id})"
    _check(where, board, _BOARD, _BOARD_OPTIONAL)
    cpu, memory = board["cpu"], board["memory"]
    if memory["reserve"] >= memory["bytes"]:
        raise BadInput(f"{where}: memory: reserve is {memory['reserve']} of {memory['bytes']} bytes")
    cores, clock = cpu["cores"], cpu["clock"]
    speeds, sources = {}, {}
    for field, table in (("int8_ops", board["int8"]), ("flops", board["float32"])):
        per_cycle, efficiency = table["per_cycle"], table["efficiency"]
        speeds[field] = cores * clock * per_cycle * efficiency
        formula = f"{cores} cores × {clock / 1e9:g} GHz × {per_cycle:g} per cycle × {efficiency:g}"
        sources[field] = f"{formula}: {table['source']}"
    bandwidth, sources["bandwidth"] = _sustained(board["bandwidth"])
    sources["cores"] = sources["instructions"] = cpu["source"]
    sources["memory_bytes"] = memory["source"]
    sources["available_bytes"] = f"total less {memory['reserve'] / 1024**2:.0f} MiB: {memory['source']}"
    accelerators = []
    for key, table in board.get("accelerators", {}).items():
        accelerators += _accelerators(f"{where}: accelerators.{key}", table, sources)
    return Device(
        id=id,
        name=board["name"],
        arch=board["arch"],
        cores=cores,
        memory_bytes=memory["bytes"],
        available_bytes=memory["bytes"] - memory["reserve"],
        bandwidth=bandwidth,
        int8_ops=speeds["int8_ops"],
        flops=speeds["flops"],
        instructions=tuple(cpu["instructions"]),
        accelerators=tuple(accelerators),
        sources=sources,
    )


def _accelerators(where: str, table: Table, sources: dict[str, str]) -> list[Accelerator]:
    """The accelerators of one table (`count` of them); their sources are added to `sources`."""
    _check(where, table, _ACCELERATOR, _ACCELERATOR_OPTIONAL)
    if table["kind"] not in ACCELERATOR_KINDS:
        kinds = ", ".join(ACCELERATOR_KINDS)
        raise BadInput(f"{where}: kind is {table['kind']!r}", hint=f"It must be one of {kinds}.")
    key = f"accelerators.{table['name']}"
    sources[f"{key}.memory_bytes"] = table["source"]
    bandwidth, sources[f"{key}.bandwidth"] = _sustained(table["bandwidth"])
    flops, sources[f"{key}.flops"] = _sustained(table["flops"])
    one = Accelerator(table["kind"], table["name"], table.get("memory"), bandwidth, flops)
    return [one] * table.get("count", 1)


def _sustained(table: Table) -> tuple[float, str]:
    peak, efficiency = table["peak"], table["efficiency"]
    return peak * efficiency, f"{peak:.4g} × {efficiency:g}: {table['source']}"


def _merge(base: Table, changes: Table) -> Table:
    """`base` with the values of `changes` in place of its own, table by table."""
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _check(where: str, table: object, needed: Mapping[str, Any], optional: Mapping[str, Any]) -> None:
    """Raises BadInput unless `table` has all `needed` keys, no unknown ones, and values of their types."""
    if not isinstance(table, dict):
        raise BadInput(f"{where} is {table!r}", hint="It must be a table.")
    for key in table:
        if key not in needed and key not in optional:
            known = ", ".join((*needed, *optional))
            raise BadInput(f"{where}: unknown key {key!r}", hint=f"Known: {known}.")
    for key, kind in (*needed.items(), *optional.items()):
        if key not in table:
            if key in needed:
                raise BadInput(f"{where}: {key} is missing")
            continue
        value = table[key]
        if isinstance(kind, dict):
            _check(f"{where}: {key}", value, kind, {})
        elif kind in (int, float):
            right = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
            if not right or value <= 0 or (key == "efficiency" and value > 1):
                want = "above 0 and at most 1" if key == "efficiency" else "a number above 0"
                raise BadInput(f"{where}: {key} is {value!r}", hint=f"It must be {want}.")
        elif not isinstance(value, kind) or (kind is str and not value):
            raise BadInput(f"{where}: {key} is {value!r}", hint=f"It must be a {kind.__name__}, not empty.")
