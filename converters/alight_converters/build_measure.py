"""Measure forms of a model against it, and remember what was measured.

Quality depends on a file and on what it is compared with; speed and memory only on which tensors of which types a
file has. Each is kept under the digest of what it depends on, so that no build measures the same twice.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

import alight
from alight import evaluate, plugins
from alight.artifact import Artifact, files_below
from alight.blobs import hash_file
from alight.builder import BuildRequest, Candidate, Progress
from alight.evaluate import Quality, Reference, Speed
from alight.gguf import read_header
from alight.planner import Prediction
from alight.target import LoadOptions, Model
from alight_converters import build_speed
from alight_converters.build_weights import FLOATS, Weights
from alight_converters.build_workspace import cache, key_of, read_json, write_json

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short note that says I will be late.",
)
_ANSWER = 64  # tokens of a sample answer
_CONTEXT = 1024  # tokens; windows and sample questions are shorter, whatever context is built for


class Judge:
    """Measures candidates against one source.

    Args:
        source: what they are compared with.
        request: the device, text and streams that count.
    """

    def __init__(self, source: Weights, request: BuildRequest, progress: Progress | None = None) -> None:
        self.source = source
        self.request = request
        self.progress = progress
        # Layouts whose speed was measured in this build, with a form that has each.
        self._fresh: dict[str, tuple[str, Path]] = {}

    # -- one candidate -------------------------------------------------------------------------------

    def measure(
        self,
        prediction: Prediction,
        made_of: Mapping[str, Any],
        file: Callable[[], Path],
        *,
        is_source: bool = False,
    ) -> Candidate:
        """Quality, speed, memory and size of one form.

        Args:
            made_of: JSON values that decide every byte of the file.
            file: makes it; not called where everything about it is known.
        """
        key = key_of(**made_of, engine=_engine())
        size, layout = self._file(key, file)
        quality = self._quality(key, prediction.quantization, file)
        run = self._run(layout, prediction.quantization, file)
        return Candidate(
            quantization=prediction.quantization,
            size=size,
            prediction=prediction,
            quality=quality,
            speed=run.speed,
            load_seconds=run.load_seconds,
            is_source=is_source,
            memory_bytes=run.memory_bytes,
            stream_speed=run.stream_speed,
        )

    def settle(self, candidate: Candidate, made_of: Mapping[str, Any]) -> Candidate:
        """A second visit after all others: on a machine with other work, the better of two is nearer the truth."""
        _, layout = self._file(key_of(**made_of, engine=_engine()), _not_again)
        if layout in self._fresh:
            second = self._measure_run(*self._fresh.pop(layout))
            before = candidate.stream_speed or candidate.speed.decode
            if (second.stream_speed or second.speed.decode) > before:
                write_json(self._run_file(layout), asdict(second))
        run = self._run(layout, candidate.quantization, _not_again)
        return replace(candidate, speed=run.speed, stream_speed=run.stream_speed)

    def answers(self, made_of: Mapping[str, Any], file: Callable[[], Path]) -> list[str]:
        """What a form says to the sample prompts, greedily."""
        remembered = _kept("answers", key_of(**made_of, engine=_engine()))
        known = read_json(remembered)
        if known is None:
            with load(file()) as model:
                known = _answers(model)
            write_json(remembered, known)
        return list(known)

    def source_answers(self) -> list[str]:
        """What the reference says to them."""
        remembered = _kept("answers", self._reference_key)
        if read_json(remembered) is None:
            _ = self._reference  # it answers while it is loaded
        return list(read_json(remembered) or [])

    def reference_note(self) -> str:
        """What quality is measured on, in words."""
        text = f"text sampled from the source model, seed {self.request.seed}"
        if self.request.text is not None:
            text = f"the given text, sha256 {_digest(self.request.text)[:12]}"
        what = "the source" if self._is_float else "the source dequantized to float32"
        if not self._is_float and not self._float_fits:
            what = "the quantized source, since its float32 form does not fit here"
        return f"{text}; reference: {what}"

    # -- the reference -------------------------------------------------------------------------------

    @cached_property
    def _is_float(self) -> bool:
        return self.source.quantization in FLOATS

    @cached_property
    def _float_fits(self) -> bool:
        return self.request.device.id != "this" or (
            4.5 * self.source.shape.parameters <= self.request.device.available_bytes
        )

    @cached_property
    def _reference_key(self) -> str:
        text = self.request.text
        return key_of(
            source=self.source.digest,
            text=None if text is None else _digest(text),
            seed=self.request.seed if text is None else None,
            tokens=self.request.tokens,
            float=self._is_float or self._float_fits,
            window=evaluate.WINDOW,
            engine=_engine(),
        )

    @cached_property
    def _reference(self) -> Reference:
        """The source's distributions. They are large, so they are computed when something is to be measured."""
        with load(self.source.gguf) as model:
            if self.request.text is None:
                windows = evaluate.sample_text(
                    model, self.request.tokens, seed=self.request.seed, progress=self.progress
                )
            else:
                windows = evaluate.windows_of(model, self.request.text, self.request.tokens)
            if self._is_float or not self._float_fits:
                return self._of(model, windows)
        file = self.source.float_gguf()
        try:
            with load(file) as model:
                return self._of(model, windows)
        finally:
            file.unlink()

    def _of(self, model: Model, windows: list[list[int]]) -> Reference:
        reference = Reference.of(model, windows, self.progress)
        write_json(_kept("answers", self._reference_key), _answers(model))
        return reference

    # -- what is remembered --------------------------------------------------------------------------

    def _file(self, key: str, file: Callable[[], Path]) -> tuple[int, str]:
        """Size and layout."""
        remembered = _kept("files", key)
        known = read_json(remembered)
        if known is None:
            path = file()
            known = {"size": bytes_of(path), "layout": layout_of(path)}
            write_json(remembered, known)
        return known["size"], known["layout"]

    def _quality(self, key: str, name: str, file: Callable[[], Path]) -> Quality:
        remembered = _kept("quality", key_of(file=key, reference=self._reference_key))
        known = read_json(remembered)
        if known is None:
            reference = self._reference
            with load(file(), name) as model:
                known = evaluate.compare(model, reference, self.progress).to_json()
            write_json(remembered, known)
        return Quality(**known)

    def _run(self, layout: str, name: str, file: Callable[[], Path]) -> build_speed.Run:
        known = read_json(self._run_file(layout))
        if known is None:
            self._fresh[layout] = (name, file())
            known = asdict(self._measure_run(*self._fresh[layout]))
            write_json(self._run_file(layout), known)
        return build_speed.Run(**(known | {"speed": Speed(**known["speed"])}))

    def _measure_run(self, name: str, file: Path) -> build_speed.Run:
        context, streams = (self.request.context, self.request.streams) if self._is_here else (_CONTEXT, 1)
        if self.progress:
            self.progress(f"speed of {name}", 0, 1)
        run = build_speed.measure(file, context=context, streams=streams)
        if self.progress:
            self.progress(f"speed of {name}", 1, 1)
        return run if self._is_here else replace(run, memory_bytes=0)

    def _run_file(self, layout: str) -> Path:
        asked = (self.request.context, self.request.streams) if self._is_here else None
        return _kept("speed", key_of(layout=layout, machine=machine(), asked=asked, engine=_engine()))

    @property
    def _is_here(self) -> bool:
        """Whether the device is this machine, so that what is measured counts."""
        return self.request.device.id == "this"


def load(file: Path, name: str = "source") -> Model:
    """A GGUF file or an exported folder, on the target that fits it. Progress calls it by `name`."""
    artifact = replace(Artifact.loose(file), name=name)
    context = min(_CONTEXT, artifact.trained_context or _CONTEXT)
    return plugins.choose_target(artifact).load(artifact, LoadOptions(context=context))


def bytes_of(path: Path) -> int:
    """Of a file, or of all files of a folder."""
    files = files_below(path).values() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def layout_of(path: Path) -> str:
    """A digest of what speed and memory depend on. Of a GGUF that is sizes and types, not values; other formats bring
    compiled code, so that it is every file."""
    if path.is_dir():
        return key_of(files={inside: hash_file(file) for inside, file in files_below(path).items()})
    header = read_header(path)
    sizes = {
        key: value
        for key, value in header.metadata.items()
        if key.startswith(f"{header.architecture}.") and isinstance(value, (int, float, bool))
    }
    return key_of(
        architecture=header.architecture,
        sizes=sizes,
        tensors=sorted([t.name, t.type, list(t.shape)] for t in header.tensors),
    )


def machine() -> dict[str, Any]:
    """What measured speeds belong to."""
    return {
        "host": platform.node(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor()
    )


def _engine() -> str:
    """Measurements and files of another engine are others."""
    return f"llama-cpp-python {version('llama-cpp-python')}, alight {alight.__version__}"


def _answers(model: Model) -> list[str]:
    if not model.template.source:
        return [model.complete(p, max_tokens=_ANSWER, temperature=0).text for p in PROMPTS]
    return [
        model.chat([{"role": "user", "content": p}], max_tokens=_ANSWER, temperature=0).text for p in PROMPTS
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(what: str, key: str) -> Path:
    return cache() / what / f"{key}.json"


def _not_again() -> Path:
    raise AssertionError("it was measured before")  # a defect of ours, not of the input
