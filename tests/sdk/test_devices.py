"""The device package: this machine, the profiles, and the parsers on recorded output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from alight import devices
from alight.devices import accelerators, cgroup, cpu, measure
from alight.devices.boards import known_speeds, parse_board
from alight.devices.device import Accelerator, Device
from alight.devices.machine import temperature
from alight.errors import BadInput, DeviceNotFound

MIB = 1024**2
FIGURES = ("cores", "memory_bytes", "available_bytes", "bandwidth", "int8_ops", "flops", "instructions")


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# --- this machine ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here() -> Device:
    return devices.probe()


def test_probe_finds_sane_values(here: Device) -> None:
    assert here.id == "this"
    assert here.name
    assert here.arch == cpu.arch()
    assert 1 <= here.cores <= 1024
    assert 0 < here.available_bytes <= here.memory_bytes
    # Wide: from a busy single-board computer to a large server.
    assert 1e8 < here.bandwidth < 1e13
    assert 1e8 < here.int8_ops < 1e15
    assert 1e8 < here.flops < 1e15
    assert here.temperature is None or -40 < here.temperature < 150


def test_probe_names_a_source_for_every_figure(here: Device) -> None:
    assert {*FIGURES, "accelerators", "temperature"} <= set(here.sources)
    assert here.sources["bandwidth"] == "measured"
    for figure in ("int8_ops", "flops"):  # llama_cpp is a dependency, so ggml is here
        assert here.sources[figure].startswith("measured")
        assert "numpy" not in here.sources[figure]


def test_device_survives_json(here: Device) -> None:
    again = Device.from_json(json.loads(json.dumps(here.to_json())))
    assert again == here
    assert hash(again) == hash(here)


def test_from_json_takes_keys_of_a_newer_version_and_refuses_wrong_ones(here: Device) -> None:
    data = here.to_json()
    assert Device.from_json({**data, "colour": "green"}) == here
    for key, value in {"cores": "four", "bandwidth": -1.0, "flops": float("nan"), "name": None}.items():
        with pytest.raises(BadInput, match=key):
            Device.from_json({**data, key: value})
    with pytest.raises(BadInput, match="kind"):
        Device.from_json({**data, "accelerators": [{"kind": "abacus", "name": "wood"}]})


def test_resolve_knows_this_machine_and_profiles() -> None:
    assert devices.resolve("here").id == "this"
    assert devices.resolve("raspberry-pi-5-8gb").name == "Raspberry Pi 5"


def test_bandwidth_needs_little_memory() -> None:
    assert measure.memory_bandwidth(threads=2, available_bytes=10 * MIB).value > 0


def test_without_ggml_the_estimate_says_that_it_is_one() -> None:
    int8, float32 = measure._numpy_speeds(("neon", "dotprod"))
    assert int8.value == 2 * float32.value > 0
    assert int8.source.startswith("estimated")
    assert "numpy" in float32.source


def test_commands_that_are_missing_fail_or_hang_print_nothing() -> None:
    python = sys.executable
    assert accelerators.command_output((python, "-c", "print('hi')"), seconds=60).strip() == "hi"
    assert accelerators.command_output(("no-such-program-of-ours",)) == ""
    assert accelerators.command_output((python, "-c", "print('hi'); raise SystemExit(3)"), seconds=60) == ""
    assert accelerators.command_output((python, "-c", "import time; time.sleep(60)"), seconds=0.1) == ""


# --- profiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", devices.profiles())
def test_every_profile_is_whole(id: str) -> None:
    device = devices.profile(id)
    assert device.id == id
    assert device.arch in ("x86_64", "aarch64")
    assert 0 < device.available_bytes < device.memory_bytes
    assert 1e9 < device.bandwidth < 1e12
    assert 1e9 < device.flops < device.int8_ops * 2
    keys = list(FIGURES)
    for accelerator in device.accelerators:
        assert accelerator.bandwidth and accelerator.flops
        keys += [f"accelerators.{accelerator.name}.{key}" for key in ("memory_bytes", "bandwidth", "flops")]
    assert set(device.sources) == set(keys)
    assert all(len(source) > 10 for source in device.sources.values())
    assert Device.from_json(json.loads(json.dumps(device.to_json()))) == device


def test_the_promised_profiles_are_there() -> None:
    wanted = {
        *(f"raspberry-pi-4-{n}gb" for n in (1, 2, 4, 8)),
        *(f"raspberry-pi-5-{n}gb" for n in (2, 4, 8, 16)),
        *(f"jetson-orin-nano-{n}gb" for n in (4, 8)),
        *(f"jetson-orin-nx-{n}gb" for n in (8, 16)),
        *(f"jetson-agx-orin-{n}gb" for n in (32, 64)),
        "jetson-thor-128gb",
        *(f"mac-mini-m4-{n}gb" for n in (16, 24, 32)),
        *(f"macbook-air-m2-{n}gb" for n in (8, 16, 24)),
        *(f"android-mid-{n}gb" for n in (6, 8)),
        *(f"android-high-{n}gb" for n in (12, 16)),
        *(f"intel-n100-{n}gb" for n in (8, 16)),
        *(f"gaming-laptop-rtx-4060-{n}gb" for n in (16, 32)),
        *("atlas-200i-a2", "atlas-300i-duo", "atlas-800-910b"),
    }
    assert wanted <= set(devices.profiles())


def test_sizes_in_ids_are_true() -> None:
    for id in devices.profiles():
        if id.endswith("gb"):
            gigabytes = int(id.rpartition("-")[2].removesuffix("gb"))
            assert devices.profile(id).memory_bytes == gigabytes * 1024**3


def test_figures_are_peak_times_efficiency() -> None:
    device = devices.profile("raspberry-pi-5-8gb")
    assert device.bandwidth == pytest.approx(17.07e9 * 0.65)
    assert device.int8_ops == pytest.approx(4 * 2.4e9 * 64 * 0.16)
    assert "4 cores × 2.4 GHz × 64 per cycle × 0.16" in device.sources["int8_ops"]


def test_unknown_profile_suggests_near_ones() -> None:
    with pytest.raises(DeviceNotFound) as caught:
        devices.profile("raspbery-pi-5-8gb")
    assert "raspberry-pi-5-8gb" in caught.value.hint
    assert "alight probe --list" in caught.value.hint
    with pytest.raises(DeviceNotFound, match="probe --list"):
        devices.profile("../../etc/passwd")


BOARD = """
name = "Board"
arch = "aarch64"
cpu = { cores = 4, clock = 2e9, instructions = ["neon"], source = "datasheet" }
memory = { bytes = 4000, reserve = 1000, source = "datasheet" }
bandwidth = { peak = 10e9, efficiency = 0.5, source = "datasheet" }
int8 = { per_cycle = 32, efficiency = 0.5, source = "datasheet" }
float32 = { per_cycle = 8, efficiency = 0.5, source = "datasheet" }
"""
GPU = """
[accelerators.gpu]
kind = "vulkan"
name = "GPU"
source = "datasheet"
bandwidth = { peak = 10e9, efficiency = 0.5, source = "datasheet" }
flops = { peak = 1e12, efficiency = 0.5, source = "datasheet" }
"""


def test_variants_replace_what_differs() -> None:
    variants = GPU + "[variants.small.memory]\nbytes = 2000\n[variants.large.accelerators.gpu]\ncount = 2\n"
    small, large = parse_board("board.toml", BOARD + variants)
    assert (small.id, small.memory_bytes, small.available_bytes) == ("board-small", 2000, 1000)
    assert (large.id, large.memory_bytes, len(large.accelerators)) == ("board-large", 4000, 2)
    (alone,) = parse_board("board.toml", BOARD)
    assert (alone.id, alone.accelerators, alone.int8_ops) == ("board", (), 4 * 2e9 * 32 * 0.5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "Board"', "", "name is missing"),
        ('name = "Board"', 'name = "Board"\ncolour = "green"', "unknown key 'colour'"),
        ("cores = 4", "cores = 4.5", "cpu: cores is 4.5"),
        ("cores = 4", "cores = true", "cpu: cores is True"),
        ("peak = 10e9, ", "", "bandwidth: peak is missing"),
        ("peak = 10e9", "peak = -1", "bandwidth: peak is -1"),
        ("per_cycle = 32, efficiency = 0.5", "per_cycle = 32, efficiency = 1.5", "int8: efficiency is 1.5"),
        ('efficiency = 0.5, source = "datasheet"', 'efficiency = 0.5, source = ""', "source is ''"),
        ("reserve = 1000", "reserve = 4000", "reserve is 4000 of 4000 bytes"),
        ('name = "Board"', 'name = "Board', "not TOML"),
        ("arch", "variants = 3\narch", "variants is 3"),
        ('kind = "vulkan"', 'kind = "abacus"', "accelerators.gpu: kind is 'abacus'"),
        ('kind = "vulkan"', "", "accelerators.gpu: kind is missing"),
    ],
)
def test_wrong_profiles_are_refused_by_file_and_key(old: str, new: str, message: str) -> None:
    text = BOARD + GPU
    assert old in text
    with pytest.raises(BadInput, match=r"^board\.toml") as caught:
        parse_board("board.toml", text.replace(old, new, 1))
    assert message in str(caught.value)


def test_a_found_accelerator_gets_its_speeds_from_the_profile_of_nearest_memory() -> None:
    found = Accelerator("cuda", "Jetson Orin Nano GPU")
    small, sources = known_speeds(found, 4 * 1000**3)
    assert small.bandwidth == devices.profile("jetson-orin-nano-4gb").accelerators[0].bandwidth
    assert sources["accelerators.Jetson Orin Nano GPU.flops"].startswith("profile jetson-orin-nano-4gb: ")
    large, _ = known_speeds(found, 8 * 1000**3)
    assert large == devices.profile("jetson-orin-nano-8gb").accelerators[0]
    unknown = Accelerator("cuda", "NVIDIA GeForce RTX 9999", 8 * MIB)
    assert known_speeds(unknown, 8 * 1000**3) == (unknown, {})


# --- limits of a container -----------------------------------------------------------------------------


def test_cgroup_v2(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "pod/memory.max": "2147483648\n",
            "pod/memory.current": "1073741824\n",
            "pod/memory.stat": "anon 4096\ninactive_file 536870912\n",
            "pod/cpu.max": "max 100000\n",
            "pod/app/memory.max": "max\n",
            "pod/app/memory.current": "4096\n",
            "pod/app/cpu.max": "250000 100000\n",
        },
    )
    limit = cgroup.memory_limit(root, "0::/pod/app\n")
    assert limit == cgroup.MemoryLimit(2048 * MIB, (2048 - 1024 + 512) * MIB)
    assert cgroup.cpu_limit(root, "0::/pod/app\n") == 2.5
    assert cgroup.cpu_limit(root, "0::/pod\n") is None


def test_cgroup_v2_with_a_namespace(tmp_path: Path) -> None:
    """Inside a container the group is the root, or a path of the host that is not mounted."""
    root = write(
        tmp_path, {"memory.max": "1048576\n", "memory.current": "2097152\n", "cpu.max": "50000 100000\n"}
    )
    for membership in ("0::/\n", "0::/docker/0123456789ab\n", "0::/../../system.slice\n"):
        assert cgroup.memory_limit(root, membership) == cgroup.MemoryLimit(MIB, 0)
        assert cgroup.cpu_limit(root, membership) == 0.5


def test_cgroup_v1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/app/memory.limit_in_bytes": "536870912\n",
            "memory/app/memory.usage_in_bytes": "268435456\n",
            "memory/app/memory.stat": "inactive_file 1\ntotal_inactive_file 134217728\n",
            "cpu/app/cpu.cfs_quota_us": "150000\n",
            "cpu/app/cpu.cfs_period_us": "100000\n",
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    membership = "9:name=systemd:/\n5:memory:/app\n2:cpu,cpuacct:/app\n0::/\n"
    assert cgroup.memory_limit(root, membership) == cgroup.MemoryLimit(512 * MIB, (512 - 256 + 128) * MIB)
    assert cgroup.cpu_limit(root, membership) == 1.5
    assert cgroup.memory_limit(root, "5:memory:/\n") is None
    assert cgroup.cpu_limit(root, "2:cpu,cpuacct:/\n") is None


def test_no_cgroups(tmp_path: Path) -> None:
    assert cgroup.memory_limit(tmp_path, "") is None
    assert cgroup.cpu_limit(tmp_path / "not-there", "0::/app\n") is None


# --- processors ----------------------------------------------------------------------------------------

PI_5_CORE = """\
processor	: {n}
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1
"""
PI_5 = (
    "\n".join(PI_5_CORE.format(n=n) for n in range(4))
    + """
Hardware	: BCM2835
Revision	: d04170
Serial		: 0000000000000000
Model		: Raspberry Pi 5 Model B Rev 1.0
"""
)
X86 = """\
processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model		: 190
model name	: Intel(R) N100
cpu MHz		: 2900.000
cache size	: 6144 KB
siblings	: 4
cpu cores	: 4
flags		: fpu vme sse sse2 ht ssse3 fma cx16 sse4_1 sse4_2 avx f16c rdrand avx2 bmi2 avx_vnni
bugs		: spectre_v1 spectre_v2
bogomips	: 1612.80
"""
# A phone: the little cores have no more than the big ones, but other names.
PHONE = """\
processor	: 0
BogoMIPS	: 38.40
Features	: fp asimd aes fphp asimdhp asimddp i8mm sve sve2
CPU implementer	: 0x41
CPU part	: 0xd46

processor	: 1
BogoMIPS	: 38.40
Features	: fp asimd aes fphp asimdhp asimddp i8mm
CPU implementer	: 0x41
CPU part	: 0xd4d

processor	: 2
BogoMIPS	: 38.40
Features	: fp asimd aes fphp asimdhp asimddp i8mm
CPU implementer	: 0x41
CPU part	: 0xd4d
"""


def test_cpuinfo_of_a_raspberry_pi_5() -> None:
    assert cpu.cpu_name(PI_5) == "4 × Cortex-A76"
    assert cpu.board_name("", PI_5) == "Raspberry Pi 5 Model B Rev 1.0"
    assert cpu.linux_instructions(PI_5) == ("neon", "dotprod", "fp16")


def test_cpuinfo_of_x86() -> None:
    assert cpu.cpu_name(X86) == "Intel(R) N100"
    assert cpu.board_name("", X86) == ""
    assert set(cpu.linux_instructions(X86)) == {"avx2", "avx_vnni", "f16c", "fma"}


def test_cpuinfo_of_a_phone_counts_only_what_every_core_has() -> None:
    assert cpu.cpu_name(PHONE) == "1 × Cortex-A510 + 2 × Cortex-A715"
    assert cpu.linux_instructions(PHONE) == ("neon", "dotprod", "fp16", "i8mm")


def test_cpuinfo_that_says_nothing() -> None:
    assert cpu.cpu_name("") == ""
    assert cpu.linux_instructions("processor : 0\n") == ()
    assert (
        cpu.board_name("NVIDIA Jetson Orin Nano Developer Kit\0", "")
        == "NVIDIA Jetson Orin Nano Developer Kit"
    )


MAC_MINI_M4 = """\
hw.ncpu: 10
hw.memsize: 17179869184
hw.perflevel0.physicalcpu: 4
hw.perflevel0.logicalcpu: 4
hw.perflevel0.name: Performance
hw.perflevel1.physicalcpu: 6
hw.perflevel1.name: Efficiency
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 1
hw.optional.AdvSIMD: 1
hw.optional.neon: 1
hw.physicalcpu: 10
hw.model: Mac16,10
machdep.cpu.cores_per_package: 10
machdep.cpu.brand_string: Apple M4
"""
INTEL_MAC = """\
hw.physicalcpu: 6
hw.model: Macmini8,1
hw.optional.avx2_0: 1
hw.optional.avx512f: 0
hw.optional.f16c: 1
hw.optional.fma: 1
machdep.cpu.brand_string: Intel(R) Core(TM) i5-8500B CPU @ 3.00GHz
"""


def test_sysctl_of_macs() -> None:
    m4, intel = cpu.parse_sysctl(MAC_MINI_M4), cpu.parse_sysctl(INTEL_MAC)
    assert cpu.performance_cores(m4)[0] == 4
    assert cpu.performance_cores(intel)[0] == 6
    assert cpu.macos_instructions(m4) == ("neon", "dotprod", "fp16", "i8mm")
    assert set(cpu.macos_instructions(intel)) == {"avx2", "f16c", "fma"}
    (gpu,) = accelerators.parse_metal(m4)
    assert gpu == Accelerator("metal", "Apple M4 GPU")
    assert known_speeds(gpu, 16 * 1024**3)[0].bandwidth is not None
    assert accelerators.parse_metal(intel) == []


def test_cores_of_hyper_threads_and_affinity(tmp_path: Path) -> None:
    siblings = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}
    write(
        tmp_path, {f"system/cpu/cpu{n}/topology/thread_siblings_list": text for n, text in siblings.items()}
    )
    assert cpu.linux_performance_cores(tmp_path, range(8), "x86_64")[0] == 4
    assert cpu.linux_performance_cores(tmp_path, [0, 1, 4], "x86_64")[0] == 2
    assert cpu.linux_performance_cores(tmp_path / "not-there", [0, 1], "x86_64")[0] == 2


def test_cores_of_a_hybrid_intel(tmp_path: Path) -> None:
    """A Core i3-1315U: two hyper-threaded performance cores and four efficient ones."""
    write(
        tmp_path,
        {
            f"system/cpu/cpu{n}/topology/thread_siblings_list": f"{n // 2 * 2}-{n // 2 * 2 + 1}"
            for n in range(4)
        },
    )
    write(tmp_path, {f"system/cpu/cpu{n}/topology/thread_siblings_list": str(n) for n in range(4, 8)})
    write(tmp_path, {"cpu_core/cpus": "0-3\n", "cpu_atom/cpus": "4-7\n"})
    assert cpu.linux_performance_cores(tmp_path, range(8), "x86_64")[0] == 2
    assert cpu.linux_performance_cores(tmp_path, range(4, 8), "x86_64")[0] == 4  # pinned to the others


@pytest.mark.parametrize(
    ("file", "values", "cores"),
    [
        ("cpu_capacity", [324] * 3 + [867] * 4 + [1024], 5),  # Snapdragon 8 Gen 2
        ("cpu_capacity", [530] * 4 + [1024] * 4, 4),  # RK3588
        ("cpufreq/cpuinfo_max_freq", [1800000] * 4 + [2400000] * 4, 4),  # RK3588 by its clocks
        ("cpufreq/cpuinfo_max_freq", [2400000] * 4, 4),  # Raspberry Pi 5
    ],
)
def test_cores_of_big_little(tmp_path: Path, file: str, values: list[int], cores: int) -> None:
    write(tmp_path, {f"system/cpu/cpu{n}/{file}": f"{value}\n" for n, value in enumerate(values)})
    assert cpu.linux_performance_cores(tmp_path, range(len(values)), "aarch64")[0] == cores


def test_boost_clocks_of_x86_do_not_count(tmp_path: Path) -> None:
    clocks = {0: 5000000, 1: 3900000}
    write(
        tmp_path, {f"system/cpu/cpu{n}/cpufreq/cpuinfo_max_freq": str(clock) for n, clock in clocks.items()}
    )
    assert cpu.linux_performance_cores(tmp_path, range(2), "x86_64")[0] == 2


def test_the_hottest_sensor_counts(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"thermal_zone0/temp": "48312\n", "thermal_zone1/temp": "51000\n", "thermal_zone2/temp": "999000\n"},
    )
    assert temperature(tmp_path) == 51.0
    assert temperature(tmp_path / "not-there") is None


# --- accelerators ----------------------------------------------------------------------------------------


def test_nvidia_smi() -> None:
    text = "NVIDIA GeForce RTX 4060 Laptop GPU, 8188\nNVIDIA H100 80GB HBM3, 81559\n"
    laptop, server = accelerators.parse_nvidia_smi(text)
    assert laptop == Accelerator("cuda", "NVIDIA GeForce RTX 4060 Laptop GPU", 8188 * MIB)
    assert server.memory_bytes == 81559 * MIB
    assert known_speeds(laptop, 16 * 1024**3)[0].flops is not None
    assert accelerators.parse_nvidia_smi("Orin (nvgpu), [N/A]\n") == [Accelerator("cuda", "Orin (nvgpu)")]
    assert accelerators.parse_nvidia_smi("No devices were found\n") == []


def test_jetson() -> None:
    compatible = "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234"
    nano = accelerators.parse_jetson(
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", compatible
    )
    assert nano == Accelerator("cuda", "Jetson Orin Nano GPU")
    for model, profile in {
        "NVIDIA Jetson AGX Orin Developer Kit": "jetson-agx-orin-64gb",
        "NVIDIA Jetson Orin NX Engineering Reference Developer Kit": "jetson-orin-nx-16gb",
        "NVIDIA Jetson AGX Thor Developer Kit": "jetson-thor-128gb",
    }.items():
        found = accelerators.parse_jetson(model, "nvidia,tegra264")
        assert found is not None
        assert found.name == devices.profile(profile).accelerators[0].name
    assert (
        accelerators.parse_jetson("Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b\0brcm,bcm2712")
        is None
    )


NPU_910B = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4-1             | OK            | 91.3        33                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3197 / 65536         |
+===========================+===============+====================================================+
| 1     910B4-1             | OK            | 88.1        32                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3197 / 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 139           | python3                  | 3312                    |
+===========================+===============+====================================================+
"""
NPU_310P = """\
+--------------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                                   Version: 25.2.0                                       |
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===============================+=================+======================================================+
| 2       310P3                 | OK              | NA           45                0     / 0             |
| 0       0                     | 0000:01:00.0    | 0            1529 / 44280                            |
+-------------------------------+-----------------+------------------------------------------------------+
| 2       310P3                 | OK              | NA           43                0     / 0             |
| 1       1                     | 0000:01:00.0    | 0            1412 / 43693                            |
+===============================+=================+======================================================+
| No running processes found in NPU 2                                                                    |
+===============================+=================+======================================================+
"""
NPU_310B = """\
+===============================+=================+======================================================+
| 0       310B4                 | Alarm           | 0.0          53                15    / 15            |
| 0       0                     | NA              | 0            1504 / 3513                             |
+===============================+=================+======================================================+
"""


def test_npu_smi() -> None:
    assert accelerators.parse_npu_smi(NPU_910B) == [Accelerator("ascend", "910B4-1", 65536 * MIB)] * 2
    found = accelerators.parse_npu_smi(NPU_310P)
    assert [(npu.name, npu.memory_bytes) for npu in found] == [("310P3", 44280 * MIB), ("310P3", 43693 * MIB)]
    assert accelerators.parse_npu_smi(NPU_310B) == [Accelerator("ascend", "310B4")]
    assert accelerators.parse_npu_smi("") == []


VULKANINFO = """\
==========
VULKANINFO
==========

Vulkan Instance Version: 1.3.275

Instance Layers: count = 1
--------------------------
VK_LAYER_MESA_device_select Linux device selection layer 1.4.303  version 1

Devices:
========
GPU0:
	apiVersion         = 1.4.318
	driverVersion      = 25.2.8
	vendorID           = 0x8086
	deviceID           = 0xa788
	deviceType         = PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU
	deviceName         = Intel(R) Graphics (RPL-S)
	driverID           = DRIVER_ID_INTEL_OPEN_SOURCE_MESA
GPU1:
	apiVersion         = 1.4.329
	driverVersion      = 595.84.0.0
	vendorID           = 0x10de
	deviceID           = 0x2860
	deviceType         = PHYSICAL_DEVICE_TYPE_DISCRETE_GPU
	deviceName         = NVIDIA GeForce RTX 4070 Laptop GPU
	driverID           = DRIVER_ID_NVIDIA_PROPRIETARY
GPU2:
	apiVersion         = 1.4.318
	vendorID           = 0x10005
	deviceID           = 0x0000
	deviceType         = PHYSICAL_DEVICE_TYPE_CPU
	deviceName         = llvmpipe (LLVM 20.1.2, 256 bits)
	driverID           = DRIVER_ID_MESA_LLVMPIPE
"""


def test_vulkaninfo() -> None:
    intel = Accelerator("vulkan", "Intel(R) Graphics (RPL-S)")
    assert accelerators.parse_vulkaninfo(VULKANINFO, {"cuda"}) == [intel]
    nvidia = Accelerator(
        "vulkan", "NVIDIA GeForce RTX 4070 Laptop GPU", 0
    )  # its memory is not in the summary
    assert accelerators.parse_vulkaninfo(VULKANINFO, set()) == [intel, nvidia]
    assert accelerators.parse_vulkaninfo("", set()) == []


def test_kfd(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "0/properties": "cpu_cores_count 16\nsimd_count 0\n",
            "0/name": "\n",
            "1/properties": "cpu_cores_count 0\nsimd_count 64\ngfx_target_version 110002\n",
            "1/name": "navi33\n",
            "1/mem_banks/0/properties": "heap_type 1\nsize_in_bytes 8573157376\n",
            "2/properties": "cpu_cores_count 16\nsimd_count 8\ngfx_target_version 90012\n",
        },
    )
    card, integrated = accelerators.read_kfd(tmp_path)
    assert card == Accelerator("rocm", "AMD navi33", 8573157376)
    assert integrated == Accelerator("rocm", "AMD gfx90c")
    assert accelerators.read_kfd(tmp_path / "not-there") == []
