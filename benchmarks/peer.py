"""llama.cpp's own server, built from the source that the installed llama-cpp-python was built from.

    python benchmarks/peer.py [--jobs N]

So both sides of a comparison run the same kernels with the same compiler options (native instructions,
OpenMP), and what differs is the engine above them. The binaries stay in `.bench/`, one folder per release;
the first build takes about 15 minutes of two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path

BENCH = Path(__file__).parent.parent / ".bench"
TARGETS = ("llama-server", "llama-bench")
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",  # the binaries find their libraries beside them wherever they lie
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)


def release() -> str:
    """The release of llama-cpp-python that alight runs on here."""
    return version("llama-cpp-python")


def folder() -> Path:
    return BENCH / f"llama.cpp-{release()}"


def server(jobs: int | None = None) -> Path:
    """The peer's `llama-server`, built now if it was not."""
    return build(jobs) / "llama-server"


def build(jobs: int | None = None) -> Path:
    """The folder with the peer's binaries. They appear there only when all are complete."""
    done = folder()
    if done.is_dir():
        return done
    work = BENCH / f"build-{release()}"  # kept when a build is interrupted, so that the next one goes on
    source = _source(work)
    _say(f"building {', '.join(TARGETS)}, once: about 15 minutes of two cores")
    started = time.monotonic()
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _run("cmake", "-S", str(source), "-B", str(work / "b"), *generator, *FLAGS)
    count = jobs or os.cpu_count() or 1
    _run("cmake", "--build", str(work / "b"), "-j", str(count), "--target", *TARGETS)
    _say(f"built in {(time.monotonic() - started) / 60:.1f} minutes")
    ready = work / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    shutil.copytree(work / "b/bin", ready, symlinks=True)
    ready.rename(done)
    shutil.rmtree(work)
    return done


def _source(work: Path) -> Path:
    """llama.cpp's source out of llama-cpp-python's source distribution."""
    source = work / "llama.cpp"
    if source.is_dir():
        return source
    work.mkdir(parents=True, exist_ok=True)
    name = f"llama-cpp-python=={release()}"
    _say(f"downloading the source of {name}")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    _run(*pip, "--no-binary", "llama-cpp-python", "--dest", str(work), name)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(work, filter="data")
    (unpacked,) = work.glob("llama_cpp_python-*/vendor/llama.cpp")
    unpacked.rename(source)
    archive.unlink()
    return source


def _run(*command: str) -> None:
    # The peer's build talks a lot; it goes to stderr so that the benchmark's own output stays a table.
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(f"the peer cannot be built: {' '.join(command[:3])} … ended with code {done.returncode}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, help="compilers at once; by default one per core")
    print(build(parser.parse_args().jobs))


if __name__ == "__main__":
    main()
