"""Build the GGUF that fits a device: search among its forms, measured against the source, and keep the best."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alight import planner
from alight.artifact import REPORT, REPORT_PAGE, SOURCE, Artifact, Description, digest_of
from alight.blobs import disk_full_is_ours, hash_file
from alight.builder import Builder, BuildRequest, BuildResult, Candidate, Progress
from alight.errors import BadInput
from alight.gguf import read_header
from alight.planner import Form, Prediction
from alight.shape import takes_imatrix
from alight.store import Store
from alight_converters import report
from alight_converters.build_measure import Judge
from alight_converters.build_weights import Weights, calibration_of, imatrix_of
from alight_converters.build_workspace import key_of, workspace
from alight_converters.quantize.gguf import quantize
from alight_converters.search import SEARCHED, choose, pareto, search

__all__ = ["GGUFBuilder", "choose", "keep"]


class GGUFBuilder(Builder):
    """GGUF artifacts through llama.cpp's quantizer."""

    def plan(self, request: BuildRequest) -> list[Prediction]:
        with workspace(0) as folder:
            return _plan(request, Weights(request.source, folder))

    def build(self, request: BuildRequest, progress: Progress | None = None) -> BuildResult:
        if request.folder is not None and request.folder.exists():
            raise BadInput(f"{request.folder} exists already", hint="Give a new folder.")
        with workspace(request.source.size) as folder, disk_full_is_ours(folder):
            source = Weights(request.source, folder)
            plan = _plan(request, source)
            forms = _Forms(source, request, progress)
            judge = Judge(source, request, progress)

            def measure(p: Prediction) -> Candidate:
                return judge.measure(p, forms.made_of(p.quantization), lambda: forms.file(p.quantization))

            if request.types:
                candidates = [measure(p) for p in plan]
            else:
                candidates = search(plan, request, measure, known=_source_itself(judge))
            candidates = [judge.settle(c, forms.made_of(c.quantization)) for c in candidates]
            chosen, reason = choose(candidates, request)
            front = pareto(candidates, request)
            made_of = forms.made_of(chosen.quantization)
            file = forms.file(chosen.quantization)
            data = report.of_build(
                request,
                candidates,
                front,
                chosen,
                reason,
                weights=source.digest,
                note=judge.reference_note(),
                samples=report.samples(judge.source_answers(), judge.answers(made_of, lambda: file)),
                calibration=forms.calibration_note,
            )
            artifact = keep(request.name, file, data, folder, source=request.source)
            write_folder(artifact, request.folder)
        return BuildResult(artifact, tuple(candidates), chosen, reason, front, (artifact,))

    def convert(self, source: Path, target: Path, quantization: str) -> Path:
        return quantize(source, target, quantization)


def keep(name: str, file: Path, data: dict[str, Any], folder: Path, *, source: Artifact) -> Artifact:
    """Put a GGUF with its report and the source's licence into the store."""
    texts = {REPORT: report.to_json(data), REPORT_PAGE: report.to_html(data)}
    for path, text in texts.items():
        (folder / path).write_text(text, encoding="utf-8")
    extra = {path: f for path, f in source.files.items() if path.lower().startswith(("license", "licence"))}
    return Store().add(
        name,
        {"model.gguf": file, **{path: folder / path for path in texts}, **extra},
        Description.of_gguf(read_header(file), licence=source.description.licence, title=name),
        lineage=source.lineage or lineage_of(source),
        annotations={SOURCE: source.annotations.get(SOURCE, source.name)},
    )


def lineage_of(loose: Artifact) -> str:
    """The lineage that the store would give to files that are not in it."""
    digests = [hash_file(file) for file in loose.weights]
    return digests[0] if len(digests) == 1 else digest_of("\n".join(digests).encode())


def write_folder(artifact: Artifact, folder: Path | None) -> None:
    """Lay an artifact's files out in a plain folder of copies, which appears when it is complete."""
    if folder is None:
        return
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with disk_full_is_ours(folder.parent):
            for path, blob in artifact.files.items():
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(blob, part / path)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _plan(request: BuildRequest, source: Weights) -> list[Prediction]:
    types: Sequence[str] | None = request.types
    if types is None:
        with_imatrix = _imatrix_fits(request, source)
        types = [form.name for kind in _kinds(source) for form in _worth_trying(kind, with_imatrix)]
    elif request.calibration is not None and not any(Form.parse(t).imatrix for t in types):
        raise BadInput(
            "a calibration text is given, but no importance matrix is made from it",
            hint=f"Ask for {types[0].lower()}+imatrix.",
        )
    return planner.plan(
        source.shape,
        request.device,
        types=types,
        context=request.context,
        min_speed=request.min_speed,
        max_memory=request.max_memory,
        streams=request.streams,
        distinct=request.types is None,  # what was asked for is built
    )


def _kinds(source: Weights) -> list[str]:
    """The types to search: a GGUF takes part as it is, and so does the float form of a checkpoint."""
    if source.is_gguf:
        return [kind for kind in SEARCHED if kind != source.quantization]
    return ["F16", *SEARCHED]


def _worth_trying(kind: str, with_imatrix: bool) -> list[Form]:
    plain = Form(kind)
    return [plain, Form(kind, imatrix=True)] if with_imatrix and takes_imatrix(kind) else [plain]


def _imatrix_fits(request: BuildRequest, source: Weights) -> bool:
    """Whether an importance matrix can be made here: it takes torch, and the model in float32."""
    if find_spec("torch") is None:
        return False
    from alight.devices import available_memory

    free = request.device.available_bytes if request.device.id == "this" else available_memory()
    return 5 * source.shape.parameters < free and source.has_family


def _source_itself(judge: Judge) -> list[Candidate]:
    """The source as it is may be the best form already."""
    source, request = judge.source, judge.request
    if not source.is_gguf:
        return []
    prediction = planner.predict(
        source.shape,
        request.device,
        quantization=source.quantization,
        context=request.context,
        streams=request.streams,
    )
    made_of = {"file": source.digest}
    return [judge.measure(prediction, made_of, lambda: source.gguf, is_source=True)]


class _Forms:
    """The files of a source's forms, each made when it is first asked for."""

    def __init__(self, source: Weights, request: BuildRequest, progress: Progress | None) -> None:
        self.source = source
        self.calibration_note = ""
        self.imatrix_file: Path | None = None
        self._request = request
        self._progress = progress
        self._files: dict[str, Path] = {}

    def made_of(self, name: str) -> dict[str, Any]:
        """What decides the bytes of a form."""
        if self._is_source(name):
            return {"file": self.source.digest}
        form = Form.parse(name)
        text, seed = self._request.calibration, self._request.seed
        calibration: dict[str, Any] | None = None
        if form.imatrix:
            calibration = {"seed": seed} if text is None else {"text": key_of(text=text)}
        return {"weights": self.source.digest, "form": form.name, "calibration": calibration}

    def file(self, name: str) -> Path:
        if self._is_source(name):
            return self.source.gguf
        if name not in self._files:
            form = Form.parse(name)
            self._files[name] = self.source.make(form, self._imatrix() if form.imatrix else None)
        return self._files[name]

    def _is_source(self, name: str) -> bool:
        return self._request.types is None and self.source.is_gguf and name == self.source.quantization

    def _imatrix(self) -> Path:
        if self.imatrix_file is None:
            checkpoint, request = self.source.checkpoint, self._request
            calibration = calibration_of(checkpoint, request.calibration, request.seed, self._progress)
            self.calibration_note = f"{calibration.origin}, {calibration.tokens} tokens"
            self.imatrix_file = imatrix_of(checkpoint, calibration, self._progress)
        return self.imatrix_file
