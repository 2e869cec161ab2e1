"""Quantize a GGUF file with llama.cpp's own quantizer.

It runs in a process of its own: it can be interrupted, and a crash of native code is an error message.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import psutil

from alight.errors import DiskFull, EngineError
from alight.planner import quant_type


def quantize(source: Path, target: Path, type_name: str) -> Path:
    """Write `source` (any GGUF; a quantized one is dequantized first) to `target` at a quantization type.

    `target` appears only when it is complete.

    Raises:
        BadInput: unknown type. DiskFull: no room. EngineError: llama.cpp refused, with its words.
    """
    kind = quant_type(type_name)
    partial = target.with_suffix(".part")
    try:
        command = [sys.executable, "-m", __name__, str(source), str(partial), kind]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            if psutil.disk_usage(str(target.parent)).free < 1 << 20:
                raise DiskFull(target.parent)
            words = [line for line in done.stderr.splitlines() if "failed" in line or "error" in line.lower()]
            why = "; ".join(words[-2:]) or f"it ended with code {done.returncode}"
            raise EngineError(f"llama.cpp cannot quantize {source.name} to {kind}: {why}")
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def main(source: str, target: str, kind: str) -> int:
    """The child process: llama.cpp's log goes to stderr."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    prefix = "LLAMA_FTYPE_ALL_" if kind == "F32" else "LLAMA_FTYPE_MOSTLY_"
    params.ftype = getattr(llama_cpp, prefix + kind)
    params.allow_requantize = True
    params.nthread = psutil.cpu_count(logical=False) or 1
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
