"""AWQ, GPTQ and W8A8 checkpoints for vLLM and LMDeploy, made by the library that each of them reads.

llmcompressor writes compressed-tensors, vLLM's own format; `lmdeploy lite` writes what LMDeploy loads. Both want
versions of torch and transformers that conflict with each other's and with ours, so each runs as a process
in an environment of its own, whose Python the user names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alight.errors import BadInput, EngineError, TargetUnavailable, Unsupported, nearest
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import CONFIG, Checkpoint

_WORKERS = Path(__file__).parent / "workers"
_BLOCKS = (128, 64, 32)  # columns that share a scale in 4-bit schemes; runtimes have kernels for these


@dataclass(frozen=True, slots=True)
class Library:
    """One quantizing library.

    Attributes:
        module: what its environment must be able to import.
        script: what runs there.
        schemes: what it makes.
        requirements: for pip, versions that were tried.
    """

    module: str
    script: Path
    schemes: tuple[str, ...]
    requirements: str


LIBRARIES = {
    "vllm": Library(
        module="llmcompressor",
        script=_WORKERS / "for_vllm.py",
        schemes=("W8A8", "GPTQ", "AWQ"),
        requirements="torch==2.13.0 llmcompressor==0.14.0.1",
    ),
    "lmdeploy": Library(
        module="lmdeploy",
        script=_WORKERS / "for_lmdeploy.py",
        schemes=("AWQ", "W8A8"),
        requirements="lmdeploy==0.18.0",
    ),
}


def quantize(
    checkpoint: Checkpoint,
    target: Path,
    scheme: str,
    calibration: Calibration,
    *,
    runtime: str,
    python: Path | str = "",
    device: str = "cpu",
) -> Path:
    """Write a quantized checkpoint for a runtime; `target`, a folder, appears only when it is complete.

    Args:
        scheme: "W8A8" (8-bit weights and activations), "GPTQ" or "AWQ" (4-bit weights).
        runtime: "vllm" or "lmdeploy".
        python: the Python of an environment that has the runtime's library.

    Raises:
        BadInput: unknown scheme or runtime, or `target` exists. Unsupported: rows that no block divides.
        TargetUnavailable: no such environment; says how to make it. EngineError: the library failed.
    """
    library = _library(runtime)
    if scheme not in library.schemes:
        raise BadInput(
            f"unknown scheme {scheme!r} for {runtime}", hint=f"It takes {', '.join(library.schemes)}."
        )
    if target.exists():
        raise BadInput(f"{target} exists already", hint="Give a new folder.")
    _check_environment(library, python)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        np.save(work / "rows.npy", calibration.rows.numpy())
        made = work / target.name
        request = {
            "source": str(checkpoint.folder.absolute()),
            "target": str(made.absolute()),
            "scheme": scheme,
            "block": 0 if scheme == "W8A8" else _block(checkpoint),
            "rows": str((work / "rows.npy").absolute()),
            "device": device,
        }
        _run(library, str(python), request, work)
        if not (made / CONFIG).is_file():
            raise EngineError(f"{library.module} ended well but wrote no {CONFIG}")
        _finish(checkpoint, made)
        made.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _library(runtime: str) -> Library:
    if runtime not in LIBRARIES:
        near = nearest(runtime, LIBRARIES) or list(LIBRARIES)
        raise BadInput(f"unknown runtime {runtime!r}", hint=f"Did you mean {' or '.join(near)}?")
    return LIBRARIES[runtime]


def _check_environment(library: Library, python: Path | str) -> None:
    make = f"python3 -m venv DIR && DIR/bin/pip install {library.requirements}"
    hint = f'Make an environment and name its Python (`python="DIR/bin/python"`): {make}'
    if not python:
        raise TargetUnavailable(
            f"{library.module} runs in an environment of its own, and none is named", hint=hint
        )
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({library.module!r}) is None)"
    try:
        done = subprocess.run([str(python), "-c", find], capture_output=True, check=False)
    except OSError as error:
        raise TargetUnavailable(f"{python} cannot be run: {error.strerror}", hint=hint) from error
    if done.returncode != 0:
        raise TargetUnavailable(f"{python} has no {library.module}", hint=hint)


def _block(checkpoint: Checkpoint) -> int:
    """The largest block that divides the rows of all matrices in the layers."""
    layers = checkpoint.family.layers + "."
    widths = {shape[1] for n, shape in checkpoint.shapes.items() if n.startswith(layers) and len(shape) == 2}
    for block in _BLOCKS:
        if all(width % block == 0 for width in widths):
            return block
    raise Unsupported(
        f"no block of {', '.join(map(str, _BLOCKS))} columns divides rows of {sorted(widths)}",
        hint="Quantize it to GGUF instead.",
    )


def _run(library: Library, python: str, request: dict[str, object], work: Path) -> None:
    """Run the script; its words are told if it fails. What it writes beside its target is thrown away."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [python, str(library.script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        errors="replace",
        cwd=work,
        env=os.environ | offline,
        check=False,
    )
    if done.returncode != 0:
        words = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        why = "; ".join(words[-2:]) or f"it ended with code {done.returncode}"
        raise EngineError(f"{library.module} cannot quantize {Path(str(request['source'])).name}: {why}")


def _finish(checkpoint: Checkpoint, made: Path) -> None:
    """Add what the library left out (licence, template), and put all of it on the disk."""
    for file in checkpoint.other_files():
        if not (made / file.name).exists():
            shutil.copyfile(file, made / file.name)
    for file in made.iterdir():
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
