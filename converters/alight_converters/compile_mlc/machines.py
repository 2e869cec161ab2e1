"""The machines that a library can be compiled for, by the names that `alight build` and `libraries.json` use."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvm.support import cc, tar
from tvm.target import Target

from alight.errors import BadInput, TargetUnavailable

_X86 = "x86_64-linux-gnu"
_V3 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")  # as /proc/cpuinfo spells them
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_HOST = {"kind": "llvm", "mtriple": _X86, "mcpu": "x86-64-v3"}
_WASM = {"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm"}
_ARM_LINUX, _ARM_MACOS = "aarch64-linux-gnu", "arm64-apple-darwin"


@dataclass(frozen=True)
class Machine:
    """
    Attributes:
        settings: of tvm's target.
        needs: CPU features without which it does not run.
        suffix: of the library's file. A `.tar` holds objects that are linked where it is loaded.
        linker: a program that must be here.
        tested: whether alight's tests run its libraries. runs_here: whether it is this machine.
    """

    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    suffix: str = ".so"
    linker: str = "gcc"
    tested: bool = False
    runs_here: Callable[[], bool] = field(default=lambda: False)

    @property
    def target(self) -> Target:
        return Target(dict(self.settings))

    @property
    def host(self) -> Mapping[str, Any]:
        """The settings of the CPU beside a GPU, or of the CPU itself."""
        found: Mapping[str, Any] = self.settings.get("host", self.settings)
        return found

    def export(self, executable: Any, path: Path) -> None:
        """Write the library.

        Raises:
            TargetUnavailable: the linker is not installed.
        """
        if self.suffix == ".tar":
            executable.export_library(str(path), fcompile=tar.tar)
            return
        if shutil.which(self.linker) is None:
            raise TargetUnavailable(
                f"linking a library for {self.host['mtriple']} needs {self.linker}",
                hint=f"On Debian and Ubuntu: apt-get install {_PACKAGES[self.linker]}",
            )
        executable.export_library(str(path), fcompile=cc.cross_compiler(self.linker))


_PACKAGES = {"gcc": "gcc", "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu"}


def _flags() -> frozenset[str]:
    """Features of this machine's x86 CPU; none on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _x86(level: str, needs: tuple[str, ...]) -> Machine:
    settings = {"kind": "llvm", "mtriple": _X86, "mcpu": level}
    return Machine(settings, needs, tested=True, runs_here=lambda: _flags() >= set(needs))


def _gpu(kind: str, host: Mapping[str, str] = _HOST, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "host": dict(host)} | more


MACHINES: Mapping[str, Machine] = {
    "x86-64-v3": _x86("x86-64-v3", _V3),
    "x86-64-v4": _x86("x86-64-v4", _V4),
    "aarch64": Machine(
        {"kind": "llvm", "mtriple": _ARM_LINUX, "mcpu": "generic", "mattr": ["+neon"]},
        linker="aarch64-linux-gnu-gcc",
        runs_here=lambda: (platform.system(), platform.machine()) == ("Linux", "aarch64"),
    ),
    "macos-arm64": Machine(
        {"kind": "llvm", "mtriple": _ARM_MACOS, "mcpu": "apple-m1"},
        suffix=".tar",
        runs_here=lambda: (platform.system(), platform.machine()) == ("Darwin", "arm64"),
    ),
    "cuda": Machine(
        _gpu("cuda", arch="sm_80", max_threads_per_block=1024, max_shared_memory_per_block=49152, thread_warp_size=32)
    ),
    "metal": Machine(
        _gpu(
            "metal", {"kind": "llvm", "mtriple": _ARM_MACOS},
            max_threads_per_block=256, max_shared_memory_per_block=32768, thread_warp_size=1,
        ),
        suffix=".tar",
    ),
    "opencl": Machine(_gpu("opencl")),
    "webgpu": Machine(_gpu("webgpu", _WASM), suffix=".tar"),
}  # fmt: skip


def machine(name: str) -> tuple[str, Machine]:
    """A machine by name; "native" is the best that is this one.

    Raises:
        BadInput: no such name. TargetUnavailable: none of them is this machine.
    """
    if name != "native":
        if name not in MACHINES:
            raise BadInput(
                f"no MLC library can be compiled for {name!r}", hint=f"Known: native, {', '.join(MACHINES)}."
            )
        return name, MACHINES[name]
    fitting = [(known, found) for known, found in MACHINES.items() if found.runs_here()]
    if not fitting:
        raise TargetUnavailable(
            f"no MLC library can be compiled for this {platform.system()} {platform.machine()} machine",
            hint=f"Compile one for another: {', '.join(MACHINES)}.",
        )
    return fitting[-1]
