"""What a machine has to run a model with.

`probe()` measures this machine; `profile("raspberry-pi-5-8gb")` describes a known board, each figure with
its source; `resolve(name)` is either.
"""

from __future__ import annotations

from alight.devices.boards import profile, profiles
from alight.devices.device import ACCELERATOR_KINDS, Accelerator, Device

__all__ = [
    "ACCELERATOR_KINDS",
    "Accelerator",
    "Device",
    "available_memory",
    "probe",
    "profile",
    "profiles",
    "resolve",
]


def probe() -> Device:
    """Measure this machine: memory, cores, instruction sets, speed of memory and arithmetic, accelerators.

    Takes about two seconds. Never raises: what cannot be found out is None, or an estimate that `sources`
    calls one.
    """
    from alight.devices import machine  # NumPy and psutil are only needed here

    return machine.probe()


def available_memory() -> int:
    """Bytes that this process may still take: free memory, within the limits of its container and of itself."""
    from alight.devices import machine

    return machine.available_memory()


def resolve(name: str) -> Device:
    """The device of that name: "this" or "here" measures this machine, any other is a profile's id.

    Raises:
        DeviceNotFound: there is no such profile.
    """
    return probe() if name in ("this", "here") else profile(name)
