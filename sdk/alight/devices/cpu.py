"""What processor this is: its name, instruction sets, and the cores worth computing on."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from alight.devices import cgroup

# Names of the kernel (/proc/cpuinfo) and of macOS (sysctl) -> ours.
_LINUX_FLAGS = {
    **{name: name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "f16c", "fma")},
    "neon": "neon",  # 32-bit Arm
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
}
_MACOS_FLAGS = {
    "hw.optional.neon": "neon",
    "hw.optional.AdvSIMD": "neon",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_FP16": "fp16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.f16c": "f16c",
    "hw.optional.fma": "fma",
}
_ORDER = list(dict.fromkeys((*_LINUX_FLAGS.values(), *_MACOS_FLAGS.values())))

# "CPU part" of Arm's own cores (CPU implementer 0x41), from Arm's technical reference manuals.
_ARM_CORES = {
    0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57",
    0xD08: "Cortex-A72", 0xD09: "Cortex-A73", 0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710",
    0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4B: "Cortex-A78C", 0xD4D: "Cortex-A715",
    0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520", 0xD81: "Cortex-A720",
    0xD82: "Cortex-X4", 0xD83: "Neoverse-V3AE", 0xD84: "Neoverse-V3", 0xD85: "Cortex-X925",
}  # fmt: skip

# A core counts as a performance core from this part of the strongest one's capacity on. Tensor G1's
# Cortex-A76 has 0.61 of its X1, to be used; RK3588's Cortex-A55 has 0.52 of its A76, to be left out.
_PERFORMANCE_CAPACITY = 0.6
# The same where only clocks are known, which differ less: RK3588 has 1.8 and 2.4 GHz.
_PERFORMANCE_CLOCK = 0.8


def arch() -> str:
    """The architecture, by one name on every system: x86_64, aarch64, armv7l, …"""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def cpu_name(cpuinfo: str) -> str:
    """The processor's name in a Linux /proc/cpuinfo; "" where it has none."""
    records = _records(cpuinfo)
    for record in records:
        if record.get("model name"):
            return record["model name"]
    cores = [_ARM_CORES.get(_hex(r.get("CPU part"))) for r in records if r.get("CPU implementer") == "0x41"]
    return " + ".join(f"{cores.count(name)} × {name}" for name in dict.fromkeys(cores) if name)


def board_name(device_tree_model: str, cpuinfo: str) -> str:
    """The board, such as Raspberry Pi 5 Model B Rev 1.0, from its device tree or an Arm /proc/cpuinfo."""
    return device_tree_model.strip("\0 \n") or next(
        (r["Model"] for r in _records(cpuinfo) if "Model" in r), ""
    )


def linux_instructions(cpuinfo: str) -> tuple[str, ...]:
    """Instruction sets that every core of a /proc/cpuinfo has."""
    per_core = [(r.get("flags") or r.get("Features") or "").split() for r in _records(cpuinfo)]
    sets = [{_LINUX_FLAGS[flag] for flag in flags if flag in _LINUX_FLAGS} for flags in per_core if flags]
    return _ordered(set.intersection(*sets)) if sets else ()


def macos_instructions(sysctl: Mapping[str, str]) -> tuple[str, ...]:
    """Instruction sets in macOS's `sysctl hw` values."""
    return _ordered({ours for theirs, ours in _MACOS_FLAGS.items() if sysctl.get(theirs) == "1"})


def parse_sysctl(text: str) -> dict[str, str]:
    """`sysctl hw machdep.cpu` as a dict."""
    pairs = (line.split(": ", 1) for line in text.splitlines() if ": " in line)
    return {key: value.strip() for key, value in pairs}


def performance_cores(sysctl: Mapping[str, str]) -> tuple[int, str]:
    """How many cores to compute on, and where that comes from.

    Physical performance cores that this process may use: within its affinity, and no more than a
    container's processor quota allows. At least 1.
    """
    if sysctl:  # macOS
        key = "hw.perflevel0.physicalcpu"  # the performance level; Intel Macs have only one kind
        if key not in sysctl:
            key = "hw.physicalcpu"
        return max(int(sysctl.get(key, "1")), 1), f"sysctl {key}"
    if hasattr(os, "sched_getaffinity"):
        count, source = linux_performance_cores(Path("/sys/devices"), os.sched_getaffinity(0), arch())
        quota = cgroup.cpu_limit()
        if quota is not None and quota < count:
            # Rounded down: threads beyond the quota are stopped while the others spin, waiting for them.
            return max(math.floor(quota), 1), f"cgroup quota of {quota:g} processors"
        return count, source
    return psutil.cpu_count(logical=False) or 1, "physical cores"


def linux_performance_cores(devices: Path, allowed: Iterable[int], machine: str) -> tuple[int, str]:
    """Physical performance cores among the `allowed` processors, of a /sys/devices folder.

    `machine` is the architecture, as `arch()` names it.
    """
    allowed = set(allowed)
    root = devices / "system/cpu"
    p_cores = _cpu_list(_read(devices / "cpu_core/cpus"))  # there on Intel's hybrid processors only
    if p_cores & allowed:
        chosen, source = p_cores & allowed, "performance cores of a hybrid processor"
    else:
        chosen, source = _strongest(root, allowed, machine), "physical cores"
        if chosen != allowed:
            source = "the strongest group of big.LITTLE cores"
    # One processor of each group of hyper-threads.
    siblings = {_read(root / f"cpu{n}/topology/thread_siblings_list") or str(n) for n in chosen}
    return max(len(siblings), 1), source


def _strongest(root: Path, allowed: set[int], machine: str) -> set[int]:
    """The big cores of big.LITTLE; all where they are alike."""
    measures = [("cpu_capacity", _PERFORMANCE_CAPACITY)]
    if machine != "x86_64":  # where clocks differ because some cores may boost a little further
        measures.append(("cpufreq/cpuinfo_max_freq", _PERFORMANCE_CLOCK))
    for file, share in measures:
        values = {n: int(text) for n in allowed if (text := _read(root / f"cpu{n}/{file}")).isdigit()}
        if len(values) == len(allowed) and len(set(values.values())) > 1:
            return {n for n, value in values.items() if value >= share * max(values.values())}
    return allowed


def _records(cpuinfo: str) -> list[dict[str, str]]:
    """/proc/cpuinfo as a dict per paragraph."""
    records = []
    for paragraph in cpuinfo.split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        records.append({key.strip(): value.strip() for key, _, value in pairs if key.strip()})
    return records


def _cpu_list(text: str) -> set[int]:
    """The processors in a kernel's list: 0-3,8 -> {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _hex(text: str | None) -> int:
    try:
        return int(text or "", 16)
    except ValueError:
        return -1


def _ordered(names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in _ORDER if name in names)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
