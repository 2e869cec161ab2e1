"""The exports of a model: each made, measured against the source, and kept; all are artifacts of one lineage."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alight import planner
from alight.builder import BuildRequest, BuildResult, Candidate
from alight.errors import BadInput
from alight.gguf import read_header
from alight.planner import Prediction, Shape
from alight.store import normal_name
from alight_converters import report
from alight_converters.build_keep import keep, write_folder
from alight_converters.build_measure import Judge, bytes_of
from alight_converters.build_weights import Weights
from alight_converters.calibration import Calibration
from alight_converters.passes import Progress
from alight_converters.quantize.gguf import Fallbacks
from alight_converters.recipe_export import Export, ExportContext
from alight_converters.search import choose, pareto

# What a format's files and speed depend on besides alight, by their distributions.
RUNTIMES = {
    "onnx": ("onnxruntime", "onnxruntime-genai", "onnx"),
    "mlc": ("apache-tvm", "apache-tvm-ffi"),
}
# Speed against llama.cpp with weights of as many bits, on x86-64: a rough prior, which benchmarks/formats.py measures.
_SHARE = {"onnx": 1.0, "mlc": 0.7}


@dataclass(frozen=True)
class Input:
    """What is exported.

    Attributes:
        weights: the source, or what passes made of it. digest: of them.
        calibration: makes the token rows that some exports need. calibration_key: what decides them.
        device: where exports compute.
    """

    weights: Weights
    digest: str
    calibration: Callable[[], Calibration]
    calibration_key: Callable[[], str]
    device: str = "cpu"
    seed: int = 0


def names_of(name: str, exports: Sequence[Export]) -> list[str]:
    """The name in the store of each export.

    Args:
        name: of the only one; of several, each has it with the export's label as its tag.

    Raises:
        BadInput: two would have the same.
    """
    names = []
    for export in exports:
        tag = export.label.lower().replace("+", "-")
        several = f"{normal_name(name).rpartition(':')[0]}:{tag}"
        names.append(export.name or (name if len(exports) == 1 else several))
    if twice := {n for n in names if names.count(n) > 1}:
        raise BadInput(
            f"two exports are named {', '.join(sorted(twice))}", hint="Give each a name of its own."
        )
    return names


@dataclass(frozen=True)
class _Made:
    """An export that was written and measured.

    Attributes:
        path: a GGUF file, or the folder of another format.
        stage: what it measured itself, for the report. fallbacks: tensors of another type than was asked for.
    """

    export: Export
    path: Path
    made_of: dict[str, Any]
    candidate: Candidate
    stage: dict[str, Any] | None
    fallbacks: Fallbacks


class Exports:
    """Makes exports of one input, and measures them against one source.

    Args:
        source: what they are compared with, and the lineage that they belong to.
        work: an empty folder that is removed afterwards.
    """

    def __init__(
        self, request: BuildRequest, source: Weights, made_from: Input, work: Path, progress: Progress
    ) -> None:
        self._request = request
        self._source = source
        self._input = made_from
        self._work = work
        self._progress = progress
        self._judge = Judge(source, request, progress)

    def build(
        self,
        exports: Sequence[Export],
        names: Sequence[str],
        *,
        settings: dict[str, Any],
        stages: Sequence[dict[str, Any]] = (),
        folder: Path | None = None,
    ) -> BuildResult:
        """
        Args:
            names: in the store, of each.
            settings, stages: for the report.
            folder: where to write plain folders, too; one below it for each where there are several.
        """
        request, judge = self._request, self._judge
        made = [self._make(number, export) for number, export in enumerate(exports)]
        candidates = [judge.settle(m.candidate, m.made_of) for m in made]
        chosen, reason = choose(candidates, request)
        front = pareto(candidates, request)
        kept = []
        for name, one, candidate in zip(names, made, candidates, strict=True):
            why = reason if candidate is chosen else f"one of {len(made)} exports"
            data = report.of_recipe(
                request.source,
                request.device,
                settings,
                [*stages, *(m.stage for m in made if m.stage)],
                report.results(candidates, front, candidate, why),
                weights=self._source.digest,
                note=judge.reference_note(),
                samples=report.samples(
                    judge.source_answers(), judge.answers(one.made_of, partial(_the, one.path))
                ),
                limits=report.limits(request),
                fallbacks=one.fallbacks,
            )
            kept.append(
                keep(name, one.path, data, self._work, source=request.source, quantization=one.export.label)
            )
            if folder is not None:
                write_folder(kept[-1], folder if len(made) == 1 else folder / name.replace(":", "-"))
        best = kept[candidates.index(chosen)]
        return BuildResult(best, tuple(candidates), chosen, reason, front, tuple(kept))

    def _make(self, number: int, export: Export) -> _Made:
        place = self._work / f"export-{number}"
        place.mkdir()
        made_from = self._input
        context = ExportContext(
            folder=place,
            weights=made_from.weights,
            calibration=made_from.calibration,
            device=made_from.device,
            target=self._request.device,
            seed=made_from.seed,
            progress=self._progress,
        )
        path = export.run(context)
        made_of = {
            "weights": made_from.digest,
            "export": export.model_dump(mode="json", exclude={"name"}),
            "calibration": made_from.calibration_key() if export.calibrated else None,
        }
        if runtime := _versions(export.format):
            made_of["runtime"] = runtime
        candidate = self._judge.measure(self._predicted(export, path), made_of, partial(_the, path))
        candidate = replace(candidate, format=export.format)
        stage = None
        if context.measured:
            stage = {
                "kind": f"export {export.label}",
                "settings": export.model_dump(mode="json"),
                "digest": "",
                "seconds": 0.0,
                "parameters": made_from.weights.shape.parameters,
                "bytes": candidate.size,
                "measured": context.measured,
                "cached": False,
            }
        return _Made(export, path, made_of, candidate, stage, context.fallbacks)

    def _predicted(self, export: Export, path: Path) -> Prediction:
        request = self._request
        if path.is_file():
            return planner.predict(
                planner.shape_of_gguf([read_header(path)]),
                request.device,
                quantization=export.label,
                context=request.context,
                streams=request.streams,
            )
        found = predict(export, self._input.weights.shape, request)
        return replace(found, memory=replace(found.memory, weights=bytes_of(path)))


def predict(export: Export, shape: Shape, request: BuildRequest) -> Prediction:
    """What an export will be on the request's device: as it says itself, else from the bits of its weights."""
    where = (request.device, request.context, request.streams)
    if known := export.predict(shape, *where):
        return known
    device, context, streams = where
    shaped = planner.quantized(shape, _like(export.label))
    found = planner.predict(shaped, device, quantization=export.label, context=context, streams=streams)
    share = _SHARE.get(export.format, 1.0)
    return replace(found, prefill=share * found.prefill, decode=share * found.decode)


def _like(label: str) -> str:
    """llama.cpp's type with as many bits as a label tells: "int4", "q4f16_1", "q0f32" (weights as they are)."""
    numbers = [int(n) for n in re.findall(r"\d+", label)]
    bits = next((n for n in numbers if n), 16)
    return "Q4_0" if bits <= 4 else "Q8_0" if bits <= 8 else "F16" if bits <= 16 else "F32"


def _versions(format: str) -> dict[str, str]:
    found = {}
    for package in RUNTIMES.get(format, ()):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _the(path: Path) -> Path:
    return path
