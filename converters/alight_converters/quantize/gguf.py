"""Quantize a GGUF file with llama.cpp's own quantizer.

It runs in a process of its own: it can be interrupted, and a crash of native code is an error message.
"""

from __future__ import annotations

import ctypes
import json
import logging
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from alight.errors import BadInput, DiskFull, EngineError, nearest
from alight.gguf import FILE_TYPES, Tensor, read_header
from alight.sources.choose import complete_split
from alight_converters.quantize import ggml
from alight_converters.quantize.files import appearing
from alight_converters.quantize.imatrix import Imatrix

log = logging.getLogger(__name__)

FLOATS = ("F32", "F16", "BF16")

Fallbacks = dict[
    str, tuple[str, str]
]  # tensors whose rows the wanted type cannot divide: (wanted, taken instead)

_PLANNED = re.compile(
    r"^\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\w+), size = .*?(?:MiB -> .* \((\w+)\))?$", re.M
)
_FELL_BACK = re.compile(
    r"(\S+) +- ncols +(\d+) not divisible by .*? type +(\w+)\).*?-> falling back to +(\w+)"
)
_NEEDS_IMATRIX = re.compile(r"offending tensor: (\S+)|Missing importance matrix for tensor (\S+)")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the quantizer would write.

    Attributes:
        types: ggml type of each tensor.
        bytes: size of all tensors.
    """

    types: dict[str, str]
    fallbacks: Fallbacks
    bytes: int


def quantize(
    source: Path,
    target: Path,
    type: str,
    *,
    imatrix: Path | Imatrix | None = None,
    tensor_types: Mapping[str, str] | None = None,
    fallbacks: Fallbacks | None = None,
) -> Path:
    """Write `source` (any GGUF; a quantized one is dequantized first) to `target` at a quantization type.

    Of a source that is split into several files, give the first; the target is one file.

    `target` appears only when it is complete. Tensors that fell back to a larger type are logged; `plan`
    tells them before.

    Args:
        type: llama.cpp's file type, "Q4_K_M".
        imatrix: importance of each input column; types below three bits need it.
        tensor_types: ggml types ("Q4_K") by tensor name, where they shall differ from those of `type`.
        fallbacks: filled with the tensors that fell back.

    Raises:
        BadInput: an unknown type or tensor; an imatrix of another model, or none where one is needed.
        DiskFull: no room. SourceError: a part of a split source is missing. EngineError: llama.cpp refused.
    """
    with appearing(target) as part:
        words = _run(source, part, type, imatrix, tensor_types, dry_run=False)
    found = _fallbacks(words)
    if fallbacks is not None:
        fallbacks |= found
    _tell(found)
    return target


def merge(source: Path, target: Path) -> Path:
    """Write a GGUF that is split into several files, of which `source` is the first, as one, bit for bit. Raises as
    `quantize` does."""
    with appearing(target) as part:
        _run(source, part, "F32", None, None, dry_run=False, copy=True)
    return target


def plan(
    source: Path,
    type: str,
    *,
    imatrix: Path | Imatrix | None = None,
    tensor_types: Mapping[str, str] | None = None,
) -> Plan:
    """What `quantize` would write with the same arguments; reads no weights. Raises what it would raise."""
    words = _run(source, None, type, imatrix, tensor_types, dry_run=True)
    if "will require an imatrix" in words:
        raise _needs_imatrix(file_type(type))
    types = {name: (new or old).upper() for name, old, new in _PLANNED.findall(words)}
    sizes = (ggml.size(types[t.name], t.count) for t in _tensors(source))
    return Plan(types, _fallbacks(words), sum(sizes))


def file_type(name: str) -> str:
    """The canonical name of a file type ("q4_k_m" -> "Q4_K_M"). Raises BadInput with the nearest one."""
    return _known(name, FILE_TYPES.values(), "quantization type")


def tensor_type(name: str) -> str:
    """The canonical name of a ggml type ("q4_k" -> "Q4_K"). Raises BadInput with the nearest one."""
    return _known(name, ggml.TENSOR_TYPES, "tensor type")


def _known(name: str, known: Collection[str], what: str) -> str:
    if name.upper() not in known:
        near = nearest(name, known)
        raise BadInput(
            f"unknown {what} {name!r}",
            hint=f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}.",
        )
    return name.upper()


def _run(
    source: Path,
    target: Path | None,
    type: str,
    imatrix: Path | Imatrix | None,
    tensor_types: Mapping[str, str] | None,
    *,
    dry_run: bool,
    copy: bool = False,
) -> str:
    """Check the arguments, run the child process, return llama.cpp's log."""
    kind = file_type(type)
    if not source.is_file():
        raise BadInput(f"there is no file {source}")
    if imatrix is not None:
        matrix = imatrix if isinstance(imatrix, Imatrix) else Imatrix.load(imatrix)
        matrix.check(_tensors(source))
    request = {
        "source": str(source),
        "target": str(target or ""),
        "kind": kind,
        "tensor_types": _checked(source, kind, tensor_types or {}),
        "dry_run": dry_run,
        "copy": copy,  # whatever `type` says
    }
    with _as_file(imatrix) as file:
        request["imatrix"] = str(file) if file else None
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode != 0:
        raise _error(source, target, kind, done)
    return done.stderr


def _checked(source: Path, kind: str, tensor_types: Mapping[str, str]) -> dict[str, str]:
    """Canonical tensor types. Raises BadInput for a tensor that is not in the file."""
    if not tensor_types:
        return {}
    if kind in FLOATS:
        raise BadInput(
            f"tensor types have no effect in a {kind} file",
            hint="Choose a quantized file type and give the tensors that shall stay float their type.",
        )
    names = {t.name for t in _tensors(source)}
    for name in tensor_types:
        if name not in names:
            near = nearest(name, names)
            raise BadInput(
                f"{source.name} has no tensor {name!r}",
                hint=f"Did you mean {' or '.join(near)}?"
                if near
                else "Use GGUF's names: blk.0.attn_q.weight.",
            )
    return {name: tensor_type(t) for name, t in tensor_types.items()}


def _tensors(source: Path) -> list[Tensor]:
    """Of all parts, where `source` is one of a split file ("x-00001-of-00003.gguf")."""
    folder = source.parent
    parts = complete_split(source.name, [f.name for f in folder.iterdir()], str(folder))
    return [tensor for part in parts for tensor in read_header(folder / part).tensors]


@contextmanager
def _as_file(imatrix: Path | Imatrix | None) -> Iterator[Path | None]:
    """The matrix where another process can read it."""
    if isinstance(imatrix, Imatrix):
        with tempfile.TemporaryDirectory() as folder:
            yield imatrix.save(Path(folder) / "imatrix.gguf")
    else:
        yield imatrix


def _error(
    source: Path, target: Path | None, kind: str, done: subprocess.CompletedProcess[str]
) -> BadInput | DiskFull | EngineError:
    if needs := _NEEDS_IMATRIX.search(done.stderr):
        return _needs_imatrix(kind, f" for {needs[1] or needs[2]}")
    if target and psutil.disk_usage(str(target.parent)).free < 1 << 20:
        return DiskFull(target.parent)
    words = [line for line in done.stderr.splitlines() if "failed" in line or "error" in line.lower()]
    why = "; ".join(words[-2:]) or f"it ended with code {done.returncode}"
    return EngineError(f"llama.cpp cannot quantize {source.name} to {kind}: {why}")


def _needs_imatrix(kind: str, where: str = "") -> BadInput:
    return BadInput(
        f"{kind} needs an importance matrix{where}",
        hint="Give `imatrix`, made by alight_converters.quantize.imatrix.collect, or take Q3_K_S or larger.",
    )


def _fallbacks(words: str) -> Fallbacks:
    found = _FELL_BACK.findall(words)
    return {name: (wanted.upper(), taken.upper()) for name, _, wanted, taken in found}


def _tell(fallbacks: Fallbacks) -> None:
    for (wanted, taken), count in Counter(fallbacks.values()).items():
        log.warning(
            "%d of the tensors are %s, not %s: their rows are no multiple of %s's block, for example %s",
            count, taken, wanted, wanted, next(n for n, pair in fallbacks.items() if pair == (wanted, taken)),
        )  # fmt: skip


# -- the child process -------------------------------------------------------------------------------


def main() -> int:
    """The request comes by stdin, as JSON; llama.cpp's log goes to stderr."""
    import llama_cpp

    request = json.load(sys.stdin)
    kind = request["kind"]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}")
    params.allow_requantize = True
    params.nthread = psutil.cpu_count(logical=False) or 1
    params.dry_run = request["dry_run"]
    params.only_copy = request["copy"]
    if request["imatrix"]:
        loaded = Imatrix.load(Path(request["imatrix"]))
        means = {name: loaded.mean(name) for name in loaded.sums}  # native code reads them: keep them alive
        imatrix = _native_imatrix(means)
        params.imatrix = ctypes.cast(imatrix, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    if request["tensor_types"]:
        overrides = _native_overrides(request["tensor_types"])
        params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    source, target = request["source"].encode(), request["target"].encode()
    return int(llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)))


def _native_imatrix(means: Mapping[str, NDArray[np.float32]]) -> ctypes.Array[Any]:
    """An array of llama_model_imatrix_data that ends with an empty entry."""
    import llama_cpp

    floats = ctypes.POINTER(ctypes.c_float)
    native = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
    for entry, (name, mean) in zip(native, means.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), mean.ctypes.data_as(floats), mean.size
    return native


def _native_overrides(types: Mapping[str, str]) -> ctypes.Array[Any]:
    """An array of llama_model_tensor_override that ends with an empty entry. The patterns are regexes."""
    import llama_cpp

    native = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, kind) in zip(native, types.items(), strict=False):
        entry.pattern = f"^{re.escape(name)}$".encode()
        entry.type = ggml.TENSOR_TYPES[kind]
    return native


if __name__ == "__main__":
    sys.exit(main())
