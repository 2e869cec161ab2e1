"""Link the WebGPU library of an MLC folder: lib/webgpu.tar (objects) and tvm's runtime -> lib/webgpu.wasm.

python examples/web/link.py FOLDER --tvm CHECKOUT [--wasm-ld wasm-ld-19]

The runtime is compiled from the sources that the wheel apache-tvm carries. It lacks four headers, which are taken
from CHECKOUT, a source tree of tvm. `emcc` of Debian 12 has a linker of LLVM 14, which cannot read the objects that
tvm's LLVM 22 writes: a newer one takes its place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

SOURCES = ("wasm_runtime", "tvmjs_support", "webgpu_runtime")
MISSING = ("include/tvm/support", "src/support", "3rdparty/compiler-rt")
# As tvm/support/emcc.py has them: web-llm's JavaScript expects a module of exactly this kind.
LINK = ("--no-entry", "-sWASM_BIGINT=1", "-sERROR_ON_UNDEFINED_SYMBOLS=0", "-sSTANDALONE_WASM=1",
        "-sALLOW_MEMORY_GROWTH=1", "-sTOTAL_MEMORY=160MB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tvm", type=Path, required=True)
    parser.add_argument("--wasm-ld", default="wasm-ld-19")
    arguments = parser.parse_args()
    library = arguments.folder / "lib" / "webgpu.wasm"
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        with tarfile.open(library.with_suffix(".tar")) as objects:
            objects.extractall(work / "model", filter="data")
        model = sorted((work / "model").rglob("*.o"))
        runtime = [compiled(name, tree(work / "tvm", arguments.tvm), work) for name in SOURCES]
        made = work / "webgpu.wasm"
        emcc([*LINK, "-O1", "-o", made, *runtime, *model], linker(work / "llvm", arguments.wasm_ld))
        shutil.copyfile(made, part := library.with_suffix(".part"))
        part.replace(library)
    print(library)


def tree(folder: Path, checkout: Path) -> Path:
    """tvm's sources as its repository has them, from the wheels and the checkout."""
    if not folder.exists():
        tvm, ffi = package("tvm"), package("tvm_ffi")
        for name in ("src", "web", "include"):
            shutil.copytree(tvm / name, folder / name)
        for name in ("src", "include"):
            shutil.copytree(ffi / name, folder / "3rdparty" / "tvm-ffi" / name)
        for name in MISSING:
            shutil.copytree(checkout / name, folder / name, dirs_exist_ok=True)
    return folder


def compiled(name: str, source: Path, work: Path) -> Path:
    """An object of the runtime; wasm_runtime takes a minute and a half."""
    made = work / f"{name}.o"
    include = (
        source,
        source / "include",
        source / "3rdparty/tvm-ffi/include",
        source / "3rdparty/compiler-rt",
    )
    flags = [f"-I{folder}" for folder in include]
    emcc(
        [
            *flags,
            "-O2",
            "-std=c++17",
            "-Wno-ignored-attributes",
            "-c",
            "-o",
            made,
            source / f"web/emcc/{name}.cc",
        ]
    )
    return made


def linker(folder: Path, wasm_ld: str) -> Path:
    """A folder of Debian's LLVM 14 tools, in which the linker is another."""
    folder.mkdir()
    for tool in Path("/usr/bin").glob("*-14"):
        (folder / tool.name).symlink_to(tool)
    (folder / "wasm-ld-14").unlink(missing_ok=True)
    (folder / "wasm-ld-14").symlink_to(
        shutil.which(wasm_ld) or exit(f"{wasm_ld} is missing: apt-get install lld-19")
    )
    return folder


def emcc(arguments: Sequence[str | Path], llvm: Path | None = None) -> None:
    environment = os.environ | ({"EM_LLVM_ROOT": str(llvm)} if llvm else {})
    subprocess.run(["emcc", *map(str, arguments)], check=True, env=environment)


def package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        exit(f"{name} is missing: pip install 'alight[convert-mlc]'")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
