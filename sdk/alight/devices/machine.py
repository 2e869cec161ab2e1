"""Measure the machine we run on."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import psutil

from alight.devices import accelerators, cgroup, cpu, measure
from alight.devices.boards import known_speeds
from alight.devices.device import Accelerator, Device

log = logging.getLogger(__name__)


def probe() -> Device:
    """This machine, measured: its id is "this". Takes 2 to 3 seconds, most of them of all cores.

    Memory and processor limits of a container count, not those of the machine around it. Never raises:
    what cannot be found or measured is left out or estimated, and `sources` says so.
    """
    begin = time.perf_counter()
    sysctl: dict[str, str] = {}
    if sys.platform == "darwin":
        sysctl = cpu.parse_sysctl(accelerators.command_output(("sysctl", "hw", "machdep.cpu")))
    cpuinfo = _read(Path("/proc/cpuinfo"))
    instructions = cpu.macos_instructions(sysctl) if sysctl else cpu.linux_instructions(cpuinfo)
    cores, cores_source = cpu.performance_cores(sysctl)
    total, available, memory_source = _memory()
    found, speed_sources = _accelerators(accelerators.find_accelerators(sysctl), total)
    degrees = temperature()
    # Last, so that nothing else of ours runs meanwhile.
    bandwidth = measure.memory_bandwidth(cores, available)
    int8, float32 = measure.matmul_speeds(cores, instructions)
    log.debug("probed in %.2f s", time.perf_counter() - begin)
    return Device(
        id="this",
        name=_name(sysctl, cpuinfo),
        arch=cpu.arch(),
        cores=cores,
        memory_bytes=total,
        available_bytes=available,
        bandwidth=bandwidth.value,
        int8_ops=int8.value,
        flops=float32.value,
        instructions=instructions,
        accelerators=found,
        temperature=degrees,
        sources={
            "cores": cores_source,
            "memory_bytes": memory_source,
            "available_bytes": measure.MEASURED,
            "bandwidth": bandwidth.source,
            "int8_ops": int8.source,
            "flops": float32.source,
            "instructions": "sysctl" if sysctl else "/proc/cpuinfo" if cpuinfo else "unknown on this system",
            "temperature": "not readable" if degrees is None else measure.MEASURED,
            **speed_sources,
        },
    )


def temperature(zones: Path = Path("/sys/class/thermal")) -> float | None:
    """°C of the hottest thermal zone; None where none can be read."""
    found = []
    for path in zones.glob("thermal_zone*/temp"):
        text = _read(path).strip()  # thousandths of a degree
        if text.lstrip("-").isdigit() and -40_000 < int(text) < 150_000:  # broken sensors say odd things
            found.append(int(text) / 1000)
    return max(found, default=None)


def _memory() -> tuple[int, int, str]:
    """(total bytes, bytes available now, where the total comes from)."""
    memory = psutil.virtual_memory()
    limit = cgroup.memory_limit()
    if limit is None or limit.total_bytes >= memory.total:
        return memory.total, memory.available, "physical memory"
    return limit.total_bytes, min(limit.available_bytes, memory.available), "cgroup limit"


def _accelerators(
    found: tuple[Accelerator, ...], memory_bytes: int
) -> tuple[tuple[Accelerator, ...], dict[str, str]]:
    """The accelerators with their speeds, where a profile knows them, and the sources."""
    sources = {"accelerators": "drivers and vendor tools"}
    full = []
    for accelerator in found:
        known, known_sources = known_speeds(accelerator, memory_bytes)
        full.append(known)
        sources.update(known_sources)
    return tuple(full), sources


def _name(sysctl: dict[str, str], cpuinfo: str) -> str:
    if sysctl:
        return f"{sysctl.get('machdep.cpu.brand_string', 'Mac')} ({sysctl.get('hw.model', 'Mac')})"
    board = cpu.board_name(_read(Path("/proc/device-tree/model")), cpuinfo)
    return board or cpu.cpu_name(cpuinfo) or cpu.arch()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def available_memory() -> int:
    """Bytes that this process may still take: free memory, within the limits of its container and of itself."""
    available = _memory()[1]
    if sys.platform != "win32":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            available = min(available, max(0, limit - psutil.Process().memory_info().vms))
    return available
