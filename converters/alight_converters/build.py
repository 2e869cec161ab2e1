"""Build the GGUF that fits a device: make candidates, measure each against the source, choose one."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import alight
from alight import evaluate, paths, planner, plugins
from alight.artifact import REPORT, SOURCE, Artifact, Description
from alight.builder import Builder, BuildRequest, BuildResult, Candidate, Progress
from alight.errors import BadInput, DiskFull, Unsupported
from alight.gguf import GGUFHeader, read_header
from alight.planner import Prediction
from alight.store import Store
from alight.target import LoadOptions, Model
from alight_converters.quantize.gguf import quantize

_FLOAT = ("F32", "F16", "BF16")


class GGUFBuilder(Builder):
    """GGUF artifacts through llama.cpp's quantizer."""

    def plan(self, request: BuildRequest) -> list[Prediction]:
        return planner.plan(
            planner.shape_of_gguf([_header(request.source)]),
            request.device,
            types=request.types or planner.WORTH_TRYING,
            context=request.context,
            min_speed=request.min_speed,
            max_memory=request.max_memory,
        )

    def build(self, request: BuildRequest, progress: Progress | None = None) -> BuildResult:
        plan = self.plan(request)
        with _workspace(request.source.size) as folder:
            reference, note = _reference(request, folder, progress)
            made: list[tuple[Candidate, Path]] = []
            for prediction in plan:
                name = prediction.quantization
                file = quantize(request.source.weights[0], folder / f"{name}.gguf", name)
                made.append((_measure(file, prediction, reference, progress), file))
            if not request.types:  # the source as it is may be the best form already
                made.append((_measure_source(request, reference, progress), request.source.weights[0]))
            made = [_measure_speed_again(candidate, file) for candidate, file in made]
            candidates = [candidate for candidate, _ in made]
            chosen, reason = choose(candidates, request)
            report = folder / REPORT
            report.write_text(json.dumps(_report(request, candidates, chosen, reason, note), indent=2))
            file = next(file for candidate, file in made if candidate is chosen)
            artifact = _keep(request, file, report)
        return BuildResult(artifact, tuple(candidates), chosen, reason)

    def convert(self, source: Path, target: Path, quantization: str) -> Path:
        return quantize(source, target, quantization)


def choose(candidates: Sequence[Candidate], request: BuildRequest) -> tuple[Candidate, str]:
    """The fastest candidate that loses no more than `max_kl`; if all lose more, the one that loses least.

    Speed is what was measured where the device is this machine, and what was predicted elsewhere.
    """

    def fast(c: Candidate) -> float:
        return speed_on(c, request)

    quick = [c for c in candidates if fast(c) >= request.min_speed]
    if not quick:
        best = max(candidates, key=fast)
        raise BadInput(
            f"no form reaches {request.min_speed:g} tokens/s on {request.device.name}: {best.quantization} "
            f"comes nearest with {fast(best):.1f}",
            hint="Lower --min-speed, or use a smaller model.",
        )
    good = [c for c in quick if kl_of(c) <= request.max_kl]
    if good:
        best = max(good, key=fast)
        return best, f"the fastest of {len(good)} whose KL to the source is at most {request.max_kl:g} nats"
    best = min(quick, key=kl_of)
    return best, f"none keeps the KL to the source under {request.max_kl:g} nats; this one loses least"


def speed_on(c: Candidate, request: BuildRequest) -> float:
    """Decode speed that counts for the choice, tokens/s."""
    return c.speed.decode if request.device.id == "this" else c.prediction.decode


def kl_of(c: Candidate) -> float:
    return c.quality.kl_mean if c.quality.kl_mean is not None else float("inf")


@contextmanager
def _workspace(size: int) -> Iterator[Path]:
    """A folder for candidates on the store's disk; gone afterwards, whatever happens."""
    root = paths.home() / "build"
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < size:
        raise DiskFull(root, size, free)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield Path(folder)


def _reference(
    request: BuildRequest, folder: Path, progress: Progress | None
) -> tuple[evaluate.Reference, str]:
    """The source model's own distributions, in float where it is quantized, and a note that says which."""
    source = request.source
    with _load(source, request) as model:
        if request.text is None:
            windows = evaluate.sample_text(model, request.tokens, seed=request.seed, progress=progress)
            text = f"sampled from the source model, seed {request.seed}"
        else:
            windows = evaluate.windows_of(model, request.text, request.tokens)
            text = "given text"
        if source.description.quantization in _FLOAT:
            return evaluate.Reference.of(model, windows, progress), f"{text}; reference: the source"
    if request.device.id == "this" and 4.5 * source.description.parameters > request.device.available_bytes:
        with _load(source, request) as model:
            note = f"{text}; reference: the quantized source, since its float32 form does not fit here"
            return evaluate.Reference.of(model, windows, progress), note
    float_file = quantize(source.weights[0], folder / "F32.gguf", "F32")
    with _load(Artifact.loose(float_file), request) as model:
        reference = evaluate.Reference.of(model, windows, progress)
    float_file.unlink()
    return reference, f"{text}; reference: the source dequantized to float32"


def _measure(
    file: Path, prediction: Prediction, reference: evaluate.Reference, progress: Progress | None
) -> Candidate:
    started = time.perf_counter()
    model = _load(replace(Artifact.loose(file), name=prediction.quantization))
    loaded = time.perf_counter() - started
    with model:
        return Candidate(
            quantization=prediction.quantization,
            size=file.stat().st_size,
            prediction=prediction,
            quality=evaluate.compare(model, reference, progress),
            speed=evaluate.speed(model),
            load_seconds=loaded,
        )


def _measure_source(
    request: BuildRequest, reference: evaluate.Reference, progress: Progress | None
) -> Candidate:
    shape = planner.shape_of_gguf([_header(request.source)])
    name = request.source.description.quantization
    prediction = planner.predict(shape, request.device, quantization=name, context=request.context)
    return replace(_measure(request.source.weights[0], prediction, reference, progress), is_source=True)


def _measure_speed_again(candidate: Candidate, file: Path) -> tuple[Candidate, Path]:
    """A second visit after all others: on a machine with other work, the better of two is nearer the truth."""
    with _load(Artifact.loose(file)) as model:
        second = evaluate.speed(model)
    if second.decode > candidate.speed.decode:
        candidate = replace(candidate, speed=second)
    return candidate, file


def _load(artifact: Artifact, request: BuildRequest | None = None) -> Model:
    context = 1024 if request is None else min(1024, request.context)
    return plugins.choose_target(artifact).load(artifact, LoadOptions(context=context))


def _header(source: Artifact) -> GGUFHeader:
    if source.format != "gguf":
        raise Unsupported(
            f"{source.name!r} is a {source.format} checkpoint",
            hint="Converting checkpoints is not in this version yet: give a GGUF file.",
        )
    if len(source.weights) > 1:
        raise Unsupported(
            f"{source.name!r} is split into {len(source.weights)} files", hint="Merge them first."
        )
    return source.header()


def _report(
    request: BuildRequest, candidates: Sequence[Candidate], chosen: Candidate, reason: str, note: str
) -> dict[str, object]:
    return {
        "alight": alight.__version__,
        "source": {
            "name": request.source.name,
            "digest": request.source.digest,
            "lineage": request.source.lineage,
        },
        "device": request.device.to_json(),
        "measured_on": platform.processor() or platform.machine(),
        "quality_measured_on": note,
        "limits": {
            "context": request.context,
            "min_speed": request.min_speed,
            "max_memory": request.max_memory,
            "max_kl": request.max_kl,
        },
        "candidates": [c.to_json() for c in candidates],
        "chosen": chosen.quantization,
        "reason": reason,
    }


def _keep(request: BuildRequest, file: Path, report: Path) -> Artifact:
    source = request.source
    extra = {path: f for path, f in source.files.items() if path.lower().startswith(("license", "licence"))}
    return Store().add(
        request.name,
        {"model.gguf": file, REPORT: report, **extra},
        Description.of_gguf(read_header(file), licence=source.description.licence, title=request.name),
        lineage=source.lineage,
        annotations={SOURCE: source.annotations.get(SOURCE, source.name)},
    )
