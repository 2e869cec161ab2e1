"""Whether the machine runs slower than it could, because it is too hot or gets too little power."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

# What the firmware of a Raspberry Pi tells, bit by bit (documented for `vcgencmd get_throttled`).
_PI_BITS = {
    0: "under_voltage",
    1: "frequency_capped",
    2: "throttled",
    3: "soft_temperature_limit",
    16: "under_voltage_occurred",
    17: "frequency_capped_occurred",
    18: "throttled_occurred",
    19: "soft_temperature_limit_occurred",
}
_PI_FILE = "devices/platform/soc/soc:firmware/get_throttled"


def reasons(sys: Path = Path("/sys")) -> dict[str, bool]:
    """Each reason to run slower that the board can tell, and whether it holds now (or, with `_occurred`, did
    since the board started). Empty where it tells nothing."""
    text = _read(sys / _PI_FILE) or _vcgencmd()
    try:
        bits = int(text.rpartition("=")[2], 16)
    except ValueError:
        return {}
    return {name: bool(bits >> bit & 1) for bit, name in _PI_BITS.items()}


def events(sys: Path = Path("/sys")) -> int | None:
    """How often a core of an x86 processor was slowed down since it started; None where it is not told."""
    files = (sys / "devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    counts = [int(text) for file in files if (text := _read(file)).isdigit()]
    return sum(counts) if counts else None


def _vcgencmd() -> str:
    command = shutil.which("vcgencmd")
    if not command:
        return ""
    try:
        done = subprocess.run(
            [command, "get_throttled"], capture_output=True, text=True, timeout=2, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()  # throttled=0x50000


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
