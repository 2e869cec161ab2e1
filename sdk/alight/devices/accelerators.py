"""Which GPUs and NPUs are here.

Each is found by its vendor's tool or the kernel. The parsers take the text that those print and are
pure; nothing here raises: a tool that is missing, fails or hangs finds nothing.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alight.devices.device import Accelerator

log = logging.getLogger(__name__)

_MIB = 1024**2
_COMMAND_SECONDS = 1.5

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_NPU_SMI = ("npu-smi", "info")
_VULKANINFO = ("vulkaninfo", "--summary")

_PCI_VENDORS = {0x10DE: "cuda", 0x1002: "rocm", 0x106B: "metal"}


def command_output(command: tuple[str, ...], seconds: float = _COMMAND_SECONDS) -> str:
    """What a program prints; "" if it is not installed, fails, or takes longer than `seconds`."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=seconds, check=True, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        log.warning("%s did not answer in %.1f s; what it would find is left out", command[0], seconds)
    except (OSError, subprocess.CalledProcessError) as error:
        log.info("%s failed: %s", command[0], error)
    else:
        return done.stdout.decode(errors="replace")
    return ""


def find_accelerators(sysctl: Mapping[str, str]) -> tuple[Accelerator, ...]:
    """The accelerators of this machine. `sysctl` is that of macOS, else empty."""
    with ThreadPoolExecutor(3) as pool:
        nvidia, npu, vulkan = pool.map(command_output, (_NVIDIA_SMI, _NPU_SMI, _VULKANINFO))
    found = parse_nvidia_smi(nvidia)
    jetson = parse_jetson(_read(Path("/proc/device-tree/model")), _read(Path("/proc/device-tree/compatible")))
    if jetson is not None:  # nvidia-smi of a Jetson knows neither its name nor its memory
        found = [jetson]
    found += read_kfd(Path("/sys/class/kfd/kfd/topology/nodes"))
    found += parse_metal(sysctl)
    found += parse_npu_smi(npu)
    found += parse_vulkaninfo(vulkan, {accelerator.kind for accelerator in found})
    return tuple(found)


def parse_nvidia_smi(text: str) -> list[Accelerator]:
    """`nvidia-smi --query-gpu=name,memory.total --format=csv,noheader,nounits`: a name and MiB a line."""
    found = []
    for line in text.splitlines():
        name, comma, memory = line.rpartition(",")
        if comma:
            shared = not memory.strip().isdigit()  # "[N/A]" where the GPU has no memory of its own
            found.append(Accelerator("cuda", name.strip(), None if shared else int(memory) * _MIB))
    return found


def parse_jetson(model: str, compatible: str) -> Accelerator | None:
    """A Jetson's GPU, from the `model` and `compatible` of its device tree."""
    if "nvidia,tegra" not in compatible:
        return None
    module = re.search(r"Jetson (AGX \w+|Orin \w+|Xavier \w+|TX\d|Nano)", model)
    return Accelerator("cuda", f"Jetson {module[1]} GPU" if module else "Tegra GPU")


def read_kfd(nodes: Path) -> list[Accelerator]:
    """AMD GPUs that the kernel's compute driver (ROCm's) knows: the nodes with SIMD units."""
    found = []
    for node in sorted(nodes.glob("*")):
        properties = parse_kfd(_read(node / "properties"))
        if properties.get("simd_count", 0) == 0:
            continue  # a processor
        banks = [parse_kfd(_read(bank)) for bank in node.glob("mem_banks/*/properties")]
        own = sum(b.get("size_in_bytes", 0) for b in banks if b.get("heap_type") in (1, 2))  # frame buffer
        version = properties.get("gfx_target_version", 0)  # 110002 is gfx1102
        gfx = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
        found.append(Accelerator("rocm", f"AMD {_read(node / 'name') or gfx}", own or None))
    return found


def parse_kfd(text: str) -> dict[str, int]:
    """A kfd properties file: "simd_count 64" a line."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def parse_metal(sysctl: Mapping[str, str]) -> list[Accelerator]:
    """The GPU of an Apple chip, which shares the host's memory."""
    chip = sysctl.get("machdep.cpu.brand_string", "")
    return [Accelerator("metal", f"{chip} GPU")] if chip.startswith("Apple ") else []


def parse_npu_smi(text: str) -> list[Accelerator]:
    """`npu-smi info`: two table rows for a chip, name and health, then bus and memory.

        | 0     910B3       | OK            | 91.3        33                0    / 0             |
        | 0                 | 0000:C1:00.0  | 0           0    / 0          3197 / 65536         |

    The last "used / total" of the second row is the chip's memory, in MB (HBM where it has both kinds).
    """
    found = []
    name = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3 or not cells[0][:1].isdigit():
            continue
        if ":" in cells[1] or cells[1] == "NA":  # a bus id
            sizes = re.findall(r"\d+\s*/\s*(\d+)", cells[2])
            if name and sizes:
                # The 310B is a system on a chip: its processor cores and its NPU share one memory.
                shared = name.startswith("310B")
                found.append(Accelerator("ascend", name, None if shared else int(sizes[-1]) * _MIB))
            name = ""
        elif len(words := cells[0].split()) == 2:
            name = words[1]
    return found


def parse_vulkaninfo(text: str, kinds: set[str]) -> list[Accelerator]:
    """`vulkaninfo --summary`: "GPU0:" and lines of "key = value" for each device.

    Software renderers are left out, and so is the GPU of a vendor whose own interface, one of `kinds`,
    was found.
    """
    found = []
    for block in re.split(r"^GPU\d+:", text, flags=re.MULTILINE)[1:]:
        pairs = (line.partition("=") for line in block.splitlines())
        values = {key.strip(): value.strip() for key, _, value in pairs}
        device_type, name = values.get("deviceType", ""), values.get("deviceName", "")
        vendor = int(values.get("vendorID", "0x0"), 16)
        if not name or device_type.endswith("_CPU") or _PCI_VENDORS.get(vendor) in kinds:
            continue
        # The summary does not say how much memory a discrete card has: 0 is "unknown".
        found.append(Accelerator("vulkan", name, 0 if device_type.endswith("DISCRETE_GPU") else None))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace").strip("\0 \n")
    except OSError:
        return ""
