"""From the records of `serving.py` to its JSON file and its tables in Markdown."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from serving_stats import Figures, median, medians, ratios


@dataclass(frozen=True, slots=True)
class Work:
    """What the report has to know of a case."""

    name: str
    title: str
    unit: str
    limit: float
    higher: bool


@dataclass(slots=True)
class Record:
    """One engine's measurement of one case in one round. Memory is in bytes; trials are not compared."""

    case: str
    engine: str  # "alight", "vllm"; any other is the peer
    setting: str  # the label of the setting
    round: int
    figures: Figures
    repeats: list[Figures]
    memory: int
    client_cpu: float = 0.0  # processor seconds of the client per second
    metrics: Figures = field(default_factory=dict)
    trial: bool = False


def measured(records: Sequence[Record], case: str, *, peer: bool) -> dict[int, Record]:
    """The records of alight or of its peer by round."""
    return {
        r.round: r
        for r in records
        if r.case == case and not r.trial and r.engine != "vllm" and (r.engine != "alight") == peer
    }


def round_ratios(records: Sequence[Record], case: str) -> list[float]:
    """alight over the peer in each round that has both."""
    ours, theirs = measured(records, case, peer=False), measured(records, case, peer=True)
    both = sorted(ours.keys() & theirs.keys())
    return ratios([(ours[n].figures["value"], theirs[n].figures["value"]) for n in both])


def step_overhead(records: Sequence[Record], case: str) -> Figures:
    """What alight's engine does in a step beside llama_decode (scheduling, sampling, delivery), by its own
    counters; empty where it tells none. Medians over the rounds."""
    rounds = []
    for record in measured(records, case, peer=False).values():
        told = {name.removeprefix("alight_engine_"): value for name, value in record.metrics.items()}
        if steps := told.get("steps_total"):
            whole, inside = told["step_seconds_total"], told["decode_seconds_total"]
            rounds.append(
                {
                    "ms": 1000 * (whole - inside) / steps,
                    "of_ms": 1000 * whole / steps,
                    "share": 1 - inside / whole,
                }
            )
    return medians(rounds) if rounds else {}


def to_json(works: Sequence[Work], records: Sequence[Record], settings: dict[str, Any]) -> dict[str, Any]:
    found = {w.name: round_ratios(records, w.name) for w in works}
    return {
        "ratios": {name: round(median(values), 4) for name, values in found.items() if values},
        "step_overhead": {w.name: over for w in works if (over := step_overhead(records, w.name))},
        "rounds": [asdict(r) for r in records],
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
    }


def machine() -> dict[str, Any]:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in _lines(Path("/proc/cpuinfo"))
            if line.startswith(("model name", "Model"))
        ),
        platform.processor() or platform.machine(),
    )
    return {
        "cpu": cpu,
        "architecture": platform.machine(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "memory": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    names = ("alight", "llama-cpp-python")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


# -- tables ----------------------------------------------------------------------------------------


def table(works: Sequence[Work], records: Sequence[Record]) -> str:
    """The comparison, one row for each case."""
    lines = [
        "| work | alight | peer | alight/peer (rounds) | must reach | memory, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for work in works:
        ours, theirs = (measured(records, work.name, peer=p) for p in (False, True))
        found = round_ratios(records, work.name)
        if not found:
            continue
        middle = median(found)
        reached = middle >= work.limit if work.higher else middle <= work.limit
        limit = f"{'>=' if work.higher else '<='} {work.limit:.2f} {'✓' if reached else '✗'}"
        memory = " / ".join(f"{median([r.memory for r in x.values()]) / 1e6:.0f}" for x in (ours, theirs))
        lines.append(
            f"| {work.title} | {_value(ours, work)} | {_value(theirs, work)} "
            f"| **{middle:.3f}** ({min(found):.2f}–{max(found):.2f}) | {limit} | {memory} |"
        )
    for work in works:
        if over := step_overhead(records, work.name):
            told = f"{over['ms']:.2f} ms of {over['of_ms']:.1f} ms ({over['share']:.1%})"
            lines.append(f"| {work.title}: a step outside llama_decode | {told} | | | reported | |")
    for work in works:
        third = {r.round: r for r in records if r.case == work.name and r.engine == "vllm"}
        if third:
            memory = f"{median([r.memory for r in third.values()]) / 1e6:.0f}"
            lines.append(f"| {work.title} | | vLLM: {_value(third, work)} | | | – / {memory} |")
    return "\n".join(lines)


def details(works: Sequence[Work], records: Sequence[Record]) -> str:
    """Every other figure, as medians over the rounds; and what the peer's settings gave in their trial."""
    lines = ["| work | server | figures |", "| --- | --- | --- |"]
    for work in works:
        mine = [r for r in records if r.case == work.name]
        for server, trial in sorted({(_server(r), r.trial) for r in mine}, key=lambda x: (x[1], x[0])):
            rows = [r for r in mine if (_server(r), r.trial) == (server, trial)]
            cpu = median([r.client_cpu for r in rows])
            figures = medians([r.figures for r in rows]) | ({"client_cpu": cpu} if cpu else {})
            told = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
            lines.append(f"| {work.name} | {server}{' (trial)' if trial else ''} | {told} |")
    return "\n".join(lines)


def _server(record: Record) -> str:
    return f"{record.engine}, {record.setting}" if record.setting else record.engine


def _value(rows: dict[int, Record], work: Work) -> str:
    return f"{_short(median([r.figures['value'] for r in rows.values()]))} {work.unit}"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file.exists() else []
