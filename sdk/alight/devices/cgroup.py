"""The memory and processor limits of a Linux container (cgroup v1 and v2).

Limits are hierarchical: any group from the process's own up to the root may have one, and the tightest
counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

_UNLIMITED = 1 << 62  # v1 writes "no limit" as the largest multiple of a page in 63 bits


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Bytes this process's group may use, and how many of them are still free."""

    total_bytes: int
    available_bytes: int


def memory_limit(root: Path = ROOT, membership: str | None = None) -> MemoryLimit | None:
    """The tightest memory limit; None where there is none.

    Args:
        root: where the control groups are mounted.
        membership: the text of /proc/self/cgroup; None reads it.
    """
    limits = []
    for group in _groups(root, membership, "memory"):
        total = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        if total is None or total >= _UNLIMITED:
            continue
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        limits.append(MemoryLimit(total, max(total - used + _reclaimable(group), 0)))
    if not limits:
        return None
    return MemoryLimit(min(x.total_bytes for x in limits), min(x.available_bytes for x in limits))


def cpu_limit(root: Path = ROOT, membership: str | None = None) -> float | None:
    """How many processors' worth of time the process may use (2.5 for a quota of 250 ms in 100 ms)."""
    limits = []
    for group in _groups(root, membership, "cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")  # v2: "max 100000" or "250000 100000"
        if not quota:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:  # v1 writes "no limit" as -1
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _groups(root: Path, membership: str | None, controller: str) -> Iterator[Path]:
    """Folders that may be the groups this process is in, for one controller, innermost first."""
    text = _text(MEMBERSHIP) if membership is None else membership
    for line in text.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":  # v2: one hierarchy for everything
            mount = root
        elif controller in controllers.split(","):  # v1: a folder per controller
            mount = root / controller
        else:
            continue
        # In a container the path may be that of the host, which is not mounted, or start with "..".
        inside = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
        for folder in (inside, *inside.parents):
            yield mount / folder


def _reclaimable(group: Path) -> int:
    """Bytes of file cache that the kernel drops when the group needs memory."""
    found = {}
    for line in _text(group / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        found[key] = value
    value = found.get("total_inactive_file", found.get("inactive_file", ""))  # v1 has both: with children
    return int(value) if value.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None
