"""Write a checkpoint as an ONNX folder, which onnxruntime-genai loads as it is.

The reader's way through: genai's own model builder writes the decoder's graph in float, in a process of its
own (onnx_worker.py); here its matrices are quantized (onnx_quantize.py, onnx_rounding.py), and what is
complete appears under its name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alight.errors import BadInput, DiskFull, EngineError, MissingExtra, Unsupported
from alight_converters.checkpoint import CONFIG, Checkpoint
from alight_converters.export.whole_folder import whole_folder
from alight_converters.passes import Progress, silent
from alight_converters.tokenizer_files import read_tokenizer

if TYPE_CHECKING:
    from alight_converters.quantize.imatrix import Imatrix

log = logging.getLogger(__name__)

GRAPH, DATA, GENAI = "model.onnx", "model.onnx.data", "genai_config.json"
FLOATS = ("fp32", "fp16")
INTEGERS = {"int8": 8, "int4": 4}
BLOCKS = (32, 64, 128)
_WORKER = "alight_converters.export.onnx_worker"
_LARGEST_FLOAT16 = 65504.0
# What the builder has no counterpart for it names with one of these; anything else is a failure.
_NO_COUNTERPART = ("NotImplementedError:", "AssertionError:")


@dataclass(frozen=True)
class Precision:
    """How the weights are held.

    Attributes:
        type: fp32, fp16, int8 or int4. The output matrix has 8 bits in either integer type, and a matrix whose
            rows no block of 32 divides stays in float.
        block: columns that share a scale: 32, 64 or 128, or less where that does not divide a matrix's rows.
        symmetric: the zero point is the middle of the range; else each block has one of its own.
    """

    type: str = "int4"
    block: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.type not in (*FLOATS, *INTEGERS):
            raise BadInput(
                f"unknown ONNX type {self.type!r}", hint=f"Use one of {', '.join((*FLOATS, *INTEGERS))}."
            )
        if self.block not in BLOCKS:
            raise BadInput(f"blocks of {self.block}", hint=f"Use one of {', '.join(map(str, BLOCKS))}.")

    @property
    def label(self) -> str:
        """Such as "int4-b32"."""
        if self.type in FLOATS:
            return self.type
        return f"{self.type}-b{self.block}{'' if self.symmetric else '-asym'}"


def export(
    checkpoint: Checkpoint,
    folder: Path,
    precision: Precision,
    *,
    imatrix: Imatrix | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Write `checkpoint` to `folder`: graph, weights, `genai_config.json`, tokenizer, chat template.

    The graph decodes with a KV cache that its caller holds. Without `imatrix` each weight goes to the nearest
    point of ONNX Runtime's own grid, so that what quantization-aware training left there stays as it is; with it,
    scales are searched for that lose least where it matters.

    Returns:
        Names of the graph's matrices that stay in float though the type is an integer.

    Raises:
        BadInput: `folder` exists, there is no tokenizer, weights overflow float16, or `imatrix` is of another model.
        InvalidModelFile: the checkpoint contradicts its config, or holds NaN. Unsupported: an unknown family, or the
        builder cannot express it. DiskFull: no room. MissingExtra: the `convert-onnx` packages are not there.
    """
    if imatrix is not None and precision.type != "int4":
        raise BadInput(f"{precision.type} has no use for an importance matrix", hint="Use int4.")
    kind = precision.type if precision.type in FLOATS else "fp32"
    _check(checkpoint, kind)
    kept: list[str] = []
    with whole_folder(folder) as part:
        progress("writing the graph", 0, 1)
        if precision.type in FLOATS:
            build([(checkpoint, part)], kind)
        else:
            build([(checkpoint, part / "float")], kind)
            kept = quantize(part / "float", part, precision, imatrix=imatrix, progress=progress)
            shutil.rmtree(part / "float")
        _finish(checkpoint, part, precision)
    if kept:
        log.warning(
            "%d matrices stay in float, since no block of 32 divides their rows: %s", len(kept), kept[0]
        )
    return kept


def build(requests: Sequence[tuple[Checkpoint, Path]], kind: str) -> None:
    """Write the float graphs of checkpoints, with all else that genai reads, into folders. No other files are read
    than theirs, and no network.

    Args:
        requests: checkpoints, each with the folder that its graph goes to. kind: "fp32" or "fp16".

    Raises:
        Unsupported: the builder cannot express one of them. EngineError: it failed. DiskFull: no room.
        MissingExtra: it is not there.
    """
    if missing := [m for m in ("onnxruntime_genai", "onnx_ir") if find_spec(m) is None]:
        raise MissingExtra(f"writing ONNX (which needs {missing[0]})", "convert-onnx")
    asked = [
        {"source": str(c.folder.absolute()), "target": str(f.absolute()), "type": kind} for c, f in requests
    ]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-m", _WORKER],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | offline,
        check=False,
    )
    if done.returncode != 0:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = words[-1] if words and done.returncode > 0 else f"it ended with code {done.returncode}"
        raise EngineError(f"onnxruntime-genai's builder failed: {why}")
    for (checkpoint, folder), why in zip(requests, json.loads(done.stdout.splitlines()[-1]), strict=True):
        if "[Errno 28]" in why:
            raise DiskFull(folder.parent)
        if why.startswith(_NO_COUNTERPART):
            raise Unsupported(
                f"onnxruntime-genai's builder cannot express {checkpoint.folder.name}: {why.partition(': ')[2]}",
                hint="Export it to GGUF instead.",
            )
        if why:
            raise EngineError(f"onnxruntime-genai's builder failed on {checkpoint.folder.name}: {why}")


def quantize(
    source: Path,
    target: Path,
    precision: Precision,
    *,
    imatrix: Imatrix | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Write the quantized form of a float32 graph that `build` made, and all else in its folder, into `target`.

    Returns and raises what `export` does.
    """
    import onnx_ir as ir

    from alight_converters.export import onnx_quantize
    from alight_converters.export.onnx_rounding import Grid

    grid = Grid(INTEGERS[precision.type], precision.block, precision.symmetric)
    model = ir.load(source / GRAPH)
    kept = onnx_quantize.quantize(model, grid, imatrix, lambda n, of: progress("quantizing", n, of))
    ir.save(model, target / GRAPH, external_data=DATA)
    for file in source.iterdir():
        if file.name not in (GRAPH, DATA):
            shutil.copyfile(file, target / file.name)
    return kept


def _check(checkpoint: Checkpoint, kind: str) -> None:
    """Refuse what would be wrong in the end, before the work."""
    _ = checkpoint.family
    checkpoint.check_shapes()
    checkpoint.check()
    read_tokenizer(checkpoint.folder)
    if kind == "fp16":
        for name, tensor in checkpoint.tensors():
            if tensor.abs().max() > _LARGEST_FLOAT16:
                raise BadInput(
                    f"tensor {name!r} has values beyond ±65504, which fp16 cannot hold",
                    hint="Use fp32 or int8.",
                )


def _finish(checkpoint: Checkpoint, part: Path, precision: Precision) -> None:
    """Free the folder of what binds it to one device, and say what it was made of."""
    settings = json.loads((part / GENAI).read_text(encoding="utf-8"))
    settings["model"]["decoder"]["session_options"][
        "provider_options"
    ] = []  # who loads it chooses the device
    _write(part / GENAI, settings)
    told = {"onnx_precision": precision.label, "num_parameters": checkpoint.parameters}
    _write(part / CONFIG, checkpoint.config | told)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
