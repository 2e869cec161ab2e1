"""The report of a build: what was done, what was measured where, what was predicted, and how to repeat it.

One JSON document, a layer of the artifact, and the same as an HTML page for people.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import alight
from alight.artifact import Artifact
from alight.builder import BuildRequest, Candidate
from alight.devices import Device
from alight_converters.build_measure import PROMPTS, machine
from alight_converters.quantize.gguf import Fallbacks
from alight_converters.report_html import page

_PACKAGES = (
    "llama-cpp-python", "numpy", "torch", "transformers", "gguf",
    "onnx", "onnxruntime", "onnxruntime-genai", "apache-tvm",
)  # fmt: skip

Json = dict[str, Any]


def of_build(
    request: BuildRequest,
    candidates: Sequence[Candidate],
    front: Sequence[Candidate],
    chosen: Candidate,
    reason: str,
    *,
    weights: str,
    note: str,
    samples: Sequence[Json],
    calibration: str,
    stages: Sequence[Json] = (),
    sensitivity: str = "",
    fallbacks: Fallbacks | None = None,
) -> Json:
    """The report of a search, or of the forms that were asked for.

    Args:
        weights: digest of the source's.
        note: what quality was measured on.
        calibration: what importance matrices were made from.
        stages: what was measured of single tensors. sensitivity: whether it was, and why not.
        fallbacks: tensors of the chosen form whose type is another than was asked for.
    """
    return {
        **_head(request.source, weights, request.device, note),
        "limits": limits(request),
        "settings": {
            "types": list(request.types) if request.types else None,
            "tokens": request.tokens,
            "seed": request.seed,
            "calibration": calibration or None,
            "sensitivity": sensitivity or None,
        },
        "stages": list(stages),
        **results(candidates, front, chosen, reason),
        "samples": list(samples),
        "fallbacks": _fallbacks(fallbacks or {}),
    }


def of_recipe(
    source: Artifact,
    device: Device,
    recipe: Json,
    stages: Sequence[Json],
    results: Json,
    *,
    weights: str,
    note: str,
    samples: Sequence[Json],
    limits: Json,
    fallbacks: Fallbacks,
) -> Json:
    """The report of one export of a recipe.

    Args:
        recipe: with every setting that was left to its default.
        stages: what each pass did: kind, settings, seconds, sizes and what it measured.
        fallbacks: tensors whose type is another than was asked for.
    """
    return {
        **_head(source, weights, device, note),
        "limits": limits,
        "settings": recipe,
        "stages": list(stages),
        **results,
        "samples": list(samples),
        "fallbacks": _fallbacks(fallbacks),
    }


def _fallbacks(found: Fallbacks) -> list[Json]:
    return [{"tensor": name, "wanted": wanted, "taken": taken} for name, (wanted, taken) in found.items()]


def results(
    candidates: Sequence[Candidate], front: Sequence[Candidate], chosen: Candidate, reason: str
) -> Json:
    """What was compared, and what came out."""
    best = {c.quantization for c in front}
    return {
        "candidates": [c.to_json() | {"pareto": c.quantization in best} for c in candidates],
        "chosen": chosen.quantization,
        "reason": reason,
    }


def limits(request: BuildRequest) -> Json:
    return {
        "context": request.context,
        "streams": request.streams,
        "min_speed": request.min_speed,
        "max_memory": request.max_memory,
        "max_kl": request.max_kl,
    }


def samples(source: Sequence[str], artifact: Sequence[str]) -> list[Json]:
    """The same questions to both models, greedily."""
    return [
        {"prompt": prompt, "source": a, "artifact": b}
        for prompt, a, b in zip(PROMPTS, source, artifact, strict=False)
    ]


def to_json(report: Json) -> str:
    return json.dumps(report, indent=2, ensure_ascii=False)


def to_html(report: Json) -> str:
    return page(report)


def _head(source: Artifact, weights: str, device: Device, note: str) -> Json:
    return {
        "alight": alight.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {p: v for p in _PACKAGES if (v := _version(p))},
        "source": {
            "name": source.name,
            "digest": source.digest,
            "weights": weights,
            "format": source.format,
            "quantization": source.description.quantization,
            "parameters": source.description.parameters,
        },
        "device": device.to_json(),
        "measured_on": machine(),
        "quality_measured_on": note,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
