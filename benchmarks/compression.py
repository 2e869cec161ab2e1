"""What an importance matrix and mixed precision win, and whether the search finds what measuring everything finds.

    python benchmarks/compression.py --text FILE [--only imatrix,mixed,search] [--llama-imatrix BINARY] [--json FILE]

SmolLM2-135M; the first half of the text calibrates, the second half is what quality is measured on, against
the model in float32, on llama.cpp. `compression_h100.py` has what needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from alight import api, evaluate, planner, plugins
from alight.artifact import Artifact
from alight.errors import AlightError
from alight.target import LoadOptions, Model
from alight_converters.build import GGUFBuilder
from alight_converters.calibration import Calibration
from alight_converters.export.gguf import export
from alight_converters.quantize.gguf import plan, quantize
from alight_converters.quantize.imatrix import Imatrix, collect
from alight_converters.quantize.mixed import choose_types
from alight_converters.search import choose, search
from alight_converters.sources import open_source

SOURCE = "builtin:smollm2"
TOKENS = 3072  # to measure on; the second half of each window counts
TYPES = ("Q4_0", "IQ4_NL", "Q3_K_M")  # IQ4_XS falls back to IQ4_NL at this width
BUDGETS: tuple[dict[str, float], ...] = (
    {"max_kl": 0.005},
    {"max_kl": 0.02},
    {"max_kl": 0.05},
    {"max_kl": 0.1},
    {"max_kl": 0.2},
    {"max_kl": 0.05, "size": 0.75},
    {"max_kl": 0.1, "size": 0.7},
    {"max_kl": 0.02, "size": 0.8},
)  # size: of the largest candidate's memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", type=lambda s: s.split(","), default=["imatrix", "mixed", "search"])
    parser.add_argument("--llama-imatrix", type=Path, help="llama.cpp's own tool, to compare with")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    half = text.index("\n", len(text) // 2)
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if {"imatrix", "mixed"} & {*args.only}:
            told |= Quantization(Path(folder), text[:half], text[half:]).run(args.only, args.llama_imatrix)
        if "search" in args.only:
            told["search"] = searches(text[:half], text[half:])
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n")


class Quantization:
    """KL of quantized forms of SmolLM2 to its float32 form."""

    def __init__(self, folder: Path, calibration: str, test: str) -> None:
        self._folder = folder
        self._text = folder / "calibration.txt"
        self._text.write_text(calibration)
        self._checkpoint = open_source(api.resolve(SOURCE).weights[0], folder)
        (self._source,) = export(self._checkpoint, folder / "source.gguf", "F32", shard=0)
        self._rows = Calibration.of_text(calibration, self._checkpoint.tokenizer(), 40, 512)
        with load(self._source) as model:
            windows = evaluate.windows_of(model, test, TOKENS)
            self._reference = evaluate.Reference.of(model, windows)

    def run(self, parts: list[str], tool: Path | None) -> dict[str, Any]:
        ours = collect(self._checkpoint, self._rows)
        told: dict[str, Any] = {}
        if "imatrix" in parts:
            matrices: dict[str, Path | Imatrix | None] = {"none": None, "alight": ours}
            if tool:
                matrices["llama-imatrix"] = self._theirs(tool)
            for kind in TYPES:
                told[kind] = {name: self._kl(kind, matrix) for name, matrix in matrices.items()}
                say(f"{kind}: " + ", ".join(f"{name} {kl:.4f}" for name, kl in told[kind].items()))
        if "mixed" in parts:
            for kind in ("Q4_0", "Q3_K_M"):
                told[f"mixed at the bytes of {kind}"] = self._mixed(kind, ours)
        return told

    def _mixed(self, kind: str, matrix: Imatrix) -> dict[str, float]:
        budget = plan(self._source, kind, imatrix=matrix).bytes
        types = choose_types(self._checkpoint, self._rows.first(16), matrix, budget)
        uniform, mixed = self._kl(kind, matrix), self._kl("Q8_0", matrix, types)
        say(f"{kind} with an importance matrix {uniform:.4f}, mixed at its {budget / 1e6:.1f} MB {mixed:.4f}")
        return {"bytes": budget, "uniform": uniform, "mixed": mixed}

    def _kl(self, kind: str, matrix: Path | Imatrix | None, types: dict[str, str] | None = None) -> float:
        file = quantize(self._source, self._folder / "form.gguf", kind, imatrix=matrix, tensor_types=types)
        try:
            with load(file) as model:
                return evaluate.compare(model, self._reference).kl_mean or 0.0
        finally:
            file.unlink()

    def _theirs(self, tool: Path) -> Path:
        """By llama.cpp's tool, from the same rows."""
        made = self._folder / "llama-imatrix.gguf"
        tokenizer = self._checkpoint.tokenizer()
        self._text.write_text(tokenizer.decode(self._rows.rows.flatten()))
        command = [tool, "-m", self._source, "-f", self._text, "-o", made, "-c", "512", "--no-ppl"]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        return made


def searches(calibration: str, test: str) -> list[dict[str, Any]]:
    """For each budget: what the search chooses after measuring few, and what is best of all that were built."""
    texts = {"text": test, "calibration": calibration}
    _, request = api.prepare_build(
        SOURCE, device="this", name="bench-search", tokens=1024, context=1024, **texts
    )
    planned = GGUFBuilder().plan(request)
    names = tuple(p.quantization for p in planned)
    built = api.build(
        SOURCE, device="this", name="bench-search", tokens=1024, context=1024, types=names, **texts
    ).candidates
    table = {c.quantization: c for c in built}
    largest = max(c.memory_bytes or c.size for c in built)
    told = []
    for budget in BUDGETS:
        limit = int(largest * budget["size"]) if "size" in budget else None
        wanted = replace(request, max_kl=budget["max_kl"], max_memory=limit)
        row = compare_choices(planned, table, wanted)
        told.append({"budget": {"max_kl": wanted.max_kl, "max_memory": limit}} | row)
        say(f"{told[-1]}")
    say(f"the same choice in {sum(r['search'] == r['everything'] for r in told)} of {len(told)} budgets")
    return told


def compare_choices(
    planned: list[planner.Prediction], table: dict[str, Any], request: Any
) -> dict[str, str | int]:
    measured: list[str] = []

    def measure(p: planner.Prediction) -> Any:
        measured.append(p.quantization)
        return table[p.quantization]

    try:
        best = choose(list(table.values()), request)[0].quantization
        found = choose(search(planned, request, measure), request)[0].quantization
    except AlightError as error:
        return {"search": str(error), "everything": "", "measured": len(measured)}
    return {"search": found, "everything": best, "measured": len(measured)}


def load(file: Path) -> Model:
    artifact = Artifact.loose(file)
    return plugins.choose_target(artifact).load(artifact, LoadOptions(context=1024))


say = partial(print, file=sys.stderr, flush=True)

if __name__ == "__main__":
    main()
