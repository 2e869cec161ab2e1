"""What an importance matrix, mixed precision and QAT win, and whether the search finds what measuring everything finds.

    python benchmarks/compression.py --text FILE [--only imatrix,mixed,qat,search] [--types Q3_K_M]
        [--llama-imatrix BINARY] [--qat FOLDER] [--json FILE]

SmolLM2-135M; the first half of the text calibrates, the second half is what quality is measured on, against
the model in float32, on llama.cpp. Each section takes a few minutes of two cores, `search` ten. Rows are told as they
come, and with --json they are on disk then: a run that is cut off keeps what it has, and `search` goes on with all that
it measured ($ALIGHT_HOME). It wants a quiet machine, since it compares speeds. A table in Markdown comes last.

`compression_h100.py` has what needs a GPU; its QAT'd checkpoint is what --qat compares.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from compression_untrained import ON_GRID, untrained

from alight import api, evaluate, plugins
from alight.artifact import Artifact
from alight.builder import BuildRequest, Candidate
from alight.errors import AlightError
from alight.target import LoadOptions, Model
from alight_converters.build import GGUFBuilder
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.gguf import export
from alight_converters.quantize.folding import fold, groups
from alight_converters.quantize.gguf import plan, quantize
from alight_converters.quantize.imatrix import Imatrix, collect
from alight_converters.quantize.mixed import fixed_bytes, options_of, solve
from alight_converters.search import choose
from alight_converters.sources import open_source

SOURCE = "builtin:smollm2"
SECTIONS = ("imatrix", "mixed", "qat", "search")
TOKENS = 3072  # to measure on; the second half of each window counts
ROWS, LENGTH = 40, 512  # of the calibration half
TYPES = ("Q4_0", "IQ4_NL", "Q3_K_M")  # IQ4_XS falls back to IQ4_NL at this width
MIXED_TYPES = ("Q4_0", "Q3_K_M")
CONTEXT = 1024
CALIBRATION = 80_000  # characters for the search: as much as ROWS and LENGTH are
BUDGETS: tuple[dict[str, float], ...] = (
    {"max_kl": 0.005},
    {"max_kl": 0.02},
    {"max_kl": 0.05},
    {"max_kl": 0.1},
    {"max_kl": 0.2},
    {"max_kl": 0.005, "memory": 0.8},
    {"max_kl": 0.01, "memory": 0.5},
    {"max_kl": 0.02, "memory": 0.2},
)  # memory: the limit's place between that of the smallest form, 0, and the largest, 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", type=lambda s: s.split(","), default=list(SECTIONS))
    parser.add_argument("--types", type=lambda s: s.split(","), default=list(TYPES), help="of imatrix")
    parser.add_argument("--llama-imatrix", type=Path, help="llama.cpp's own tool, to compare with")
    parser.add_argument("--qat", type=Path, help="a checkpoint folder, trained for q4_0")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.only) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    text = args.text.read_text(encoding="utf-8")
    half = text.index("\n", len(text) // 2)
    told = Rows(args.json)
    with tempfile.TemporaryDirectory() as folder:
        quantization = Quantization(Path(folder), text[:half], text[half:])
        if "imatrix" in args.only:
            imatrix(quantization, args.types, args.llama_imatrix, told)
        if "mixed" in args.only:
            mixed(quantization, told)
        if "qat" in args.only:
            qat(quantization, args.qat, told)
        if "search" in args.only:
            source = off_grid(quantization.checkpoint, Path(folder) / "off-grid")
            searches(source, text[:half][:CALIBRATION], text[half:], told)
    print(told.table())


class Rows:
    """Rows of the result: told and written as they come.

    Args:
        file: JSON, replaced after each row; what other runs left in it stays, but for rows of the same name.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.rows: dict[str, dict[str, Any]] = {}
        if file and file.exists():
            self.rows = json.loads(file.read_text())

    def add(self, name: str, bar: str, met: bool | None, **figures: Any) -> None:
        """`met`: whether the bar is; None where that cannot be told."""
        self.rows[name] = {**figures, "bar": bar, "met": met}
        say(f"{name}: {_figures(figures)} | {bar}: {_verdict(met)}")
        if self._file:
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps(self.rows, indent=1) + "\n")
            part.replace(self._file)

    def table(self) -> str:
        lines = ["| what | measured | bar | met |", "| --- | --- | --- | --- |"]
        for name, row in self.rows.items():
            figures = {k: v for k, v in row.items() if k not in ("bar", "met")}
            lines.append(f"| {name} | {_figures(figures)} | {row['bar']} | {_verdict(row['met'])} |")
        return "\n".join(lines)


def _figures(figures: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())


def _verdict(met: bool | None) -> str:
    return "not told" if met is None else "yes" if met else "no"


class Quantization:
    """KL of quantized forms of SmolLM2 to its float32 form. What is expensive is made when it is asked for."""

    def __init__(self, folder: Path, calibration: str, test: str) -> None:
        self.folder = folder
        self._calibration = calibration
        self._test = test

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_source(api.resolve(SOURCE).weights[0], self.folder)

    @cached_property
    def source(self) -> Path:
        return self.exported(self.checkpoint, "source")

    @cached_property
    def rows(self) -> Calibration:
        return Calibration.of_text(self._calibration, self.checkpoint.tokenizer(), ROWS, LENGTH)

    @cached_property
    def matrix(self) -> Imatrix:
        return collect(self.checkpoint, self.rows)

    @cached_property
    def _reference(self) -> evaluate.Reference:
        with load(self.source) as model:
            return evaluate.Reference.of(model, evaluate.windows_of(model, self._test, TOKENS))

    def exported(self, checkpoint: Checkpoint, name: str) -> Path:
        (file,) = export(checkpoint, self.folder / f"{name}.gguf", "F32", shard=0)
        return file

    def kl(
        self,
        kind: str,
        matrix: Path | Imatrix | None = None,
        types: dict[str, str] | None = None,
        source: Path | None = None,
    ) -> float:
        """Mean KL in nats of `source`, the model itself unless told, at a type."""
        made = self.folder / "form.gguf"
        file = quantize(source or self.source, made, kind, imatrix=matrix, tensor_types=types)
        try:
            return self.kl_of(file)
        finally:
            file.unlink()

    def kl_of(self, file: Path) -> float:
        with load(file) as model:
            return evaluate.compare(model, self._reference).kl_mean or 0.0

    def matrix_of_llama(self, tool: Path) -> Path:
        """By llama.cpp's own tool, from the same rows."""
        made, text = self.folder / "llama-imatrix.gguf", self.folder / "calibration.txt"
        text.write_text(self.checkpoint.tokenizer().decode(self.rows.rows.flatten()))
        command = [tool, "-m", self.source, "-f", text, "-o", made, "-c", str(LENGTH), "--no-ppl"]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        return made


# -- sections ----------------------------------------------------------------------------------------


def imatrix(q: Quantization, kinds: list[str], tool: Path | None, told: Rows) -> None:
    theirs = q.matrix_of_llama(tool) if tool else None
    for kind in kinds:
        found = {"none": q.kl(kind), "alight": q.kl(kind, q.matrix)}
        told.add(f"imatrix {kind}", "alight < none", found["alight"] < found["none"], **found)
        if theirs:
            other = q.kl(kind, theirs)
            near = found["alight"] <= 1.03 * other
            told.add(f"imatrix {kind}, against llama-imatrix", "within 3 %", near, **found, llama=other)


def mixed(q: Quantization, told: Rows) -> None:
    """At the bytes of a uniform type; both with the same importance matrix."""
    options = options_of(q.checkpoint, q.rows.first(16), q.matrix)
    for kind in MIXED_TYPES:
        budget = plan(q.source, kind, imatrix=q.matrix).bytes
        chosen = solve(options, budget - fixed_bytes(q.checkpoint))
        types = {name: option.type for name, option in chosen.items()}
        found = {
            "uniform": q.kl(kind, q.matrix),
            "mixed": q.kl("Q8_0", q.matrix, types),
            "mixed, MB": round(plan(q.source, "Q8_0", imatrix=q.matrix, tensor_types=types).bytes / 1e6, 1),
        }
        megabytes = f"{budget / 1e6:.1f} MB"
        met = found["mixed"] < found["uniform"]
        told.add(f"mixed at the {megabytes} of {kind}", "mixed < uniform", met, **found)


def qat(q: Quantization, trained: Path | None, told: Rows) -> None:
    """Q4_0 with the embedding at Q8_0, the types that QAT trains for, with and without training."""
    found = {}
    with tempfile.TemporaryDirectory(dir=q.folder) as folder:
        for form, file in untrained(q.checkpoint, q.rows, Path(folder)):
            found[form] = q.kl_of(file)
            told.add(f"Q4_0 without training: {form}", "none, for comparison", None, kl=found[form])
    if trained:
        kl = q.kl("Q4_0", None, ON_GRID, q.exported(Checkpoint.open(trained), "qat"))
        best = min(found, key=lambda name: found[name])
        met = kl <= 0.5 * found[best]
        told.add("QAT to Q4_0", f"at most half of the best, {best}", met, kl=kl, best=found[best])


def searches(source: Checkpoint, calibration: str, test: str, told: Rows) -> None:
    """For each budget: what a build chooses after measuring few, and what is best of all forms that were built."""
    _, request = api.prepare_build(
        str(source.folder), device="this", name="bench-search", format="gguf", tokens=TOKENS // 3, context=CONTEXT,
        text=test, calibration=calibration,
    )  # fmt: skip
    names = tuple(p.quantization for p in GGUFBuilder().plan(request))
    _, everything = _build(replace(request, types=names))
    for c in everything:
        told.add(f"form {c.quantization}", "none, for comparison", None, **_of_form(c))
    found = 0
    for budget in BUDGETS:
        wanted = replace(request, max_kl=budget["max_kl"], max_memory=_limit(everything, budget))
        asked = f"max_kl {wanted.max_kl:g}"
        if wanted.max_memory:
            asked += f", {wanted.max_memory / 1e6:.0f} MB"
        try:
            chosen, measured = _build(wanted)
        except AlightError as error:
            told.add(f"search: {asked}", "the best of all built", False, error=str(error).splitlines()[0])
            continue
        built = {c.quantization: c for c in [*everything, *measured]}
        best = choose(list(built.values()), wanted)[0]
        found += chosen.quantization == best.quantization
        told.add(
            f"search: {asked}",
            "the best of all built",
            chosen.quantization == best.quantization,
            chosen=chosen.quantization,
            best=best.quantization,
            measured=len([c for c in measured if not c.is_source]),
            built=len([c for c in built.values() if not c.is_source]),
        )
    met = found >= len(BUDGETS) - 1
    told.add("search, in all", f"{len(BUDGETS) - 1} of {len(BUDGETS)}", met, found=found)


def off_grid(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The same function by weights that are on no grid: columns are scaled at random, and what writes them inversely.

    The weights at hand are those of a Q4_1 file. A search would find that Q4_1 loses nothing, which no model does.
    """
    generator = torch.Generator().manual_seed(0)
    scales = {g: (0.2 * torch.randn(g.width, generator=generator)).exp() for g in groups(checkpoint)}
    return fold(checkpoint, scales, folder)


def _of_form(c: Candidate) -> dict[str, Any]:
    speed, memory = round(c.speed.decode, 1), round((c.memory_bytes or 0) / 1e6, 1)
    return {
        "kl": c.quality.kl_mean,
        "tokens/s": speed,
        "memory, MB": memory,
        "size, MB": round(c.size / 1e6, 1),
    }


def _build(request: BuildRequest) -> tuple[Candidate, tuple[Candidate, ...]]:
    """What is measured is kept by the build, so nothing is measured twice."""
    result = GGUFBuilder().build(request)
    return result.chosen, result.candidates


def _limit(everything: Sequence[Candidate], budget: dict[str, float]) -> int | None:
    if "memory" not in budget:
        return None
    memory = [c.memory_bytes for c in everything]
    return round(min(memory) + budget["memory"] * (max(memory) - min(memory)))


def load(file: Path) -> Model:
    artifact = Artifact.loose(file)
    return plugins.choose_target(artifact).load(artifact, LoadOptions(context=CONTEXT))


say = partial(print, file=sys.stderr, flush=True)

if __name__ == "__main__":
    main()
