"""Which of an artifact's compiled libraries runs on this machine."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alight.errors import InvalidModelFile, TargetUnavailable

FOLDER, LIST = "lib", "libraries.json"
_SYSTEMS = {"Linux": "linux", "Darwin": "darwin", "Windows": "windows"}
_PROCESSORS = {"amd64": "x86_64", "arm64": "aarch64"}
_GPUS = ("cuda", "metal", "opencl")  # as tvm calls its devices, the best first


@dataclass(frozen=True)
class Library:
    """
    Attributes:
        device: tvm's name of the device it runs on, such as "cpu" or "cuda".
        context: tokens of a conversation that it is compiled for.
        unrun: why it may not work; empty where it was run.
    """

    name: str
    path: Path
    device: str
    context: int
    unrun: str


def choose(folder: Path) -> Library:
    """The best library for this machine: for a GPU that tvm sees, else for the CPU with the most that it has.

    Raises:
        TargetUnavailable: there is none for this machine, or only of a newer tvm.
        InvalidModelFile: the list is damaged, or names a file that is missing.
    """
    entries = _read(folder / FOLDER / LIST)
    here = [name for name, entry in entries.items() if _runs_here(entry)]
    if not here:
        raise TargetUnavailable(
            f"{folder.name} has no MLC library for this {platform.system()} {platform.machine()} machine"
            + (f", only for {', '.join(entries)}" if entries else ""),
            hint="`alight build SOURCE --format mlc` on this machine makes one.",
        )
    installed = version("apache-tvm")
    usable = [name for name in here if _numbers(entries[name]["tvm"]) <= _numbers(installed)]
    if not usable:
        needed = entries[here[0]]["tvm"]
        raise TargetUnavailable(
            f"the MLC library was compiled by tvm {needed}; tvm {installed} is installed and cannot run it",
            hint=f"Run: pip install apache-tvm=={needed}, or compile the model again: "
            "`alight build SOURCE --format mlc`.",
        )
    name = max(usable, key=lambda name: _worth(entries[name]))
    entry = entries[name]
    path = folder / FOLDER / str(entry["file"])
    if not path.is_file():
        raise InvalidModelFile(f"the MLC library {path} is missing", hint="Fetch or build the model again.")
    kind = entry["target"]["kind"]
    return Library(
        name, path, "cpu" if kind == "llvm" else kind, int(entry["context"]), str(entry.get("run", ""))
    )


def cpu_flags() -> frozenset[str]:
    """Features of this machine's x86 CPU by Linux's names; none on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries.values():
            _ = (
                entry["file"],
                entry["tvm"],
                int(entry["context"]),
                entry["target"]["kind"],
                entry["host"]["mtriple"],
            )
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModelFile(f"{path} is damaged: {error!r}", hint="Build the model again.") from error
    found: Mapping[str, Any] = entries
    return found


def _runs_here(entry: Mapping[str, Any]) -> bool:
    processor = platform.machine().lower()
    triple = entry["host"]["mtriple"].replace("arm64", "aarch64")
    if (
        _PROCESSORS.get(processor, processor) not in triple
        or _SYSTEMS.get(platform.system(), "?") not in triple
    ):
        return False
    if not cpu_flags() >= set(entry.get("needs", ())):
        return False
    kind = entry["target"]["kind"]
    return kind == "llvm" or (kind in _GPUS and _exists(kind))


def _exists(kind: str) -> bool:
    import tvm

    return bool(tvm.device(kind, 0).exist)


def _worth(entry: Mapping[str, Any]) -> tuple[int, int]:
    kind = entry["target"]["kind"]
    return (len(_GPUS) - _GPUS.index(kind) if kind in _GPUS else 0, len(entry.get("needs", ())))


def _numbers(release: str) -> tuple[int, ...]:
    """0.27.0.post1 as (0, 27, 0, 1), which compares as releases do."""
    return tuple(int(number) for number in re.findall(r"\d+", release))
