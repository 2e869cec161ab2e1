"""Build the GGUF that fits a device: search among its forms, measured against the source, and keep the best."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alight import planner
from alight.blobs import disk_full_is_ours
from alight.builder import Builder, BuildRequest, BuildResult, Candidate, Progress
from alight.errors import BadInput
from alight.planner import Form, Prediction
from alight.quantization import quant_type, takes_imatrix
from alight_converters import report
from alight_converters.build_keep import keep, write_folder
from alight_converters.build_measure import Judge
from alight_converters.build_mixed import Mix, mix_of, room_for
from alight_converters.build_weights import (
    Weights,
    calibration_key,
    calibration_of,
    check_calibration,
    imatrix_of,
    told,
)
from alight_converters.build_workspace import cache, key_of, read_json, workspace, write_json
from alight_converters.quantize.gguf import quantize
from alight_converters.search import SEARCHED, choose, pareto, search

if TYPE_CHECKING:  # torch is not needed to quantize a GGUF
    from alight_converters.calibration import Calibration

__all__ = ["GGUFBuilder", "choose"]


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
                candidates += [measure(p) for p in forms.mixed(candidates)]
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
                calibration=forms.calibration_note(candidates),
                stages=[forms.mix.to_stage()] if forms.mix else [],
                sensitivity=forms.sensitivity_note,
                fallbacks=source.fallbacks.get(chosen.quantization, {}),
            )
            artifact = keep(request.name, file, data, folder, source=request.source)
            write_folder(artifact, request.folder)
        return BuildResult(artifact, tuple(candidates), chosen, reason, front, (artifact,))

    def convert(self, source: Path, target: Path, quantization: str) -> Path:
        return quantize(
            source, target, Form(quant_type(quantization)).type
        )  # a Form refuses what needs a matrix


def _plan(request: BuildRequest, source: Weights) -> list[Prediction]:
    check_calibration(request.calibration)
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
        self.imatrix_file: Path | None = None
        self.mix: Mix | None = None
        self.sensitivity_note = "not measured: these types were asked for"
        self._request = request
        self._progress = progress
        self._files: dict[str, Path] = {}

    def made_of(self, name: str) -> dict[str, Any]:
        """What decides the bytes of a form."""
        if self._is_source(name):
            return {"file": self.source.digest}
        calibration: dict[str, Any] | None = self._calibration_key
        if self.mix and name == self.mix.name:
            return {"weights": self.source.digest, "types": self.mix.types, "calibration": calibration}
        form = Form.parse(name)
        calibration = calibration if form.imatrix else None
        return {"weights": self.source.digest, "form": form.name, "calibration": calibration}

    def file(self, name: str) -> Path:
        if self._is_source(name):
            return self.source.gguf
        if name not in self._files:
            if self.mix and name == self.mix.name:
                self._files[name] = self.mix.make(self.source, self._imatrix())
            else:
                form = Form.parse(name)
                self._files[name] = self.source.make(form, self._imatrix() if form.imatrix else None)
        return self._files[name]

    def mixed(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """A form with a type for each tensor, where memory binds and one can be made."""
        room, why = room_for(self.source, candidates, self._request)
        if room and not _imatrix_fits(self._request, self.source):
            room, why = 0, "it takes torch, a known family and memory for the model in float32"
        if room:
            try:
                matrix, rows = self._imatrix(), self._calibration
                self.mix = mix_of(self.source, rows, matrix, room, self._request, self._progress)
            except BadInput as error:
                why = error.message
        self.sensitivity_note = "measured" if self.mix else f"not measured: {why}"
        return [self.mix.prediction] if self.mix else []

    def _is_source(self, name: str) -> bool:
        return self._request.types is None and self.source.is_gguf and name == self.source.quantization

    @cached_property
    def _calibration_key(self) -> dict[str, Any]:
        return calibration_key(self._request.calibration, self._request.seed)

    @cached_property
    def _calibration(self) -> Calibration:
        request = self._request
        made = calibration_of(self.source.checkpoint, request.calibration, request.seed, self._progress)
        write_json(self._note_file, told(made))
        return made

    @property
    def _note_file(self) -> Path:
        key = key_of(weights=self.source.digest, calibration=self._calibration_key)
        return cache() / "calibration" / f"{key}.json"

    def calibration_note(self, candidates: Sequence[Candidate]) -> str:
        """What the importance matrices of the candidates were made from, in this build or before; "" without any."""
        if not any(self.made_of(c.quantization).get("calibration") for c in candidates):
            return ""
        return read_json(self._note_file) or told(self._calibration)

    def _imatrix(self) -> Path:
        if self.imatrix_file is None:
            self.imatrix_file = imatrix_of(self.source.checkpoint, self._calibration, self._progress)
        return self.imatrix_file
