"""What `pip install alight` costs a small device: size on disk, and the time and memory of an import.

    python benchmarks/footprint.py

It installs alight (the core, no extras) into a fresh environment.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROUNDS = 15


def seconds(python: Path, code: str) -> float:
    started = time.perf_counter()
    subprocess.run([python, "-c", code], check=True)
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = Path(folder) / "bin/python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--prefer-binary"]
        subprocess.run([*pip, "--no-compile", str(ROOT)], check=True)
        site = next((Path(folder) / "lib").glob("python*/site-packages"))
        sizes = {
            p.name: sum(f.stat().st_size for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file())
            for p in site.iterdir()
        }
        print(
            f"installed size: {sum(sizes.values()) / 1e6:.0f} MB in {len(list(site.glob('*.dist-info')))} packages"
        )
        for name, size in sorted(sizes.items(), key=lambda x: -x[1])[:8]:
            print(f"  {size / 1e6:6.1f} MB  {name}")
        seconds(python, "import alight")  # writes the byte code
        pairs = [(seconds(python, "pass"), seconds(python, "import alight")) for _ in range(ROUNDS)]
        bare, full = (statistics.median(x) for x in zip(*pairs, strict=True))
        print(f"import alight: {(full - bare) * 1000:.0f} ms over a bare interpreter ({bare * 1000:.0f} ms)")
        code = "import resource, alight; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        peak = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
        print(f"memory after the import: {int(peak) / 1024:.0f} MB")


if __name__ == "__main__":
    main()
