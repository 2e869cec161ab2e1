"""ONNX Runtime on this machine: imported without its telemetry, and which execution provider a model gets.

Set ALIGHT_ONNX_PROVIDER to the name of a provider (cuda, coreml, …) to choose it, and ALIGHT_ONNX_ENGINE to `genai` or
`onnxruntime` to choose between onnxruntime-genai and plain onnxruntime.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alight.errors import BadInput, TargetUnavailable

log = logging.getLogger("alight.onnx")

ENGINES = ("genai", "onnxruntime")
INSTALL = "pip install 'alight[onnx]'"


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: as users choose it.
        full: as onnxruntime calls it.
        genai: as onnxruntime-genai calls it; empty where that has none.
        package: of onnxruntime and of onnxruntime-genai that brings it.
    """

    name: str
    full: str
    genai: str
    package: str


# Best first: where several are installed for this machine, the first one is taken.
PROVIDERS = (
    Provider("cuda", "CUDAExecutionProvider", "cuda", "onnxruntime-gpu, onnxruntime-genai-cuda"),
    Provider("tensorrt", "TensorrtExecutionProvider", "NvTensorRtRtx", "onnxruntime-gpu"),
    Provider("qnn", "QNNExecutionProvider", "qnn", "onnxruntime-qnn"),
    Provider("openvino", "OpenVINOExecutionProvider", "OpenVINO", "onnxruntime-openvino"),
    Provider("directml", "DmlExecutionProvider", "dml", "onnxruntime-directml, onnxruntime-genai-directml"),
    Provider("coreml", "CoreMLExecutionProvider", "", "onnxruntime"),
    Provider("webgpu", "WebGpuExecutionProvider", "webgpu", "onnxruntime-webgpu"),
    Provider("cpu", "CPUExecutionProvider", "", "onnxruntime"),
)
_BY_NAME = {provider.name: provider for provider in PROVIDERS}
CPU = _BY_NAME["cpu"]
# The others compile a model for minutes, take few of a decoder's operators, or want a graph made for them: they are
# only taken for a model that was exported for them, or when they are asked for.
_AUTOMATIC = {"cuda", "directml", "cpu"}


def onnxruntime() -> Any:
    """The module.

    Raises:
        TargetUnavailable: it is not installed, or does not load.
    """
    return _load("onnxruntime")


def genai() -> Any:
    """onnxruntime_genai, which brings onnxruntime.

    Raises:
        TargetUnavailable: it is not installed, or does not load.
    """
    onnxruntime()
    return _load("onnxruntime_genai")


def is_installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def _load(module: str) -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # on by default, and read when the library is loaded
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise TargetUnavailable(f"{module} cannot be loaded: {error}", hint=f"Run: {INSTALL}") from error


def choose_provider(asked: str, wanted_by_model: str) -> tuple[Provider, str]:
    """The execution provider for a model, and a word for people where it is not the one that was wanted.

    Args:
        asked: by the user, by name; empty for the best one here.
        wanted_by_model: the provider that the graph was exported for, as onnxruntime-genai calls it; empty for any.

    Raises:
        BadInput: there is no provider of that name. TargetUnavailable: it is not in the installed onnxruntime.
    """
    here = set(onnxruntime().get_available_providers())
    asked = asked or os.environ.get("ALIGHT_ONNX_PROVIDER", "")
    if asked:
        provider = _BY_NAME.get(asked.lower())
        if provider is None:
            raise BadInput(f"unknown execution provider {asked!r}", hint=f"Known: {', '.join(_BY_NAME)}.")
        if provider.full not in here:
            raise TargetUnavailable(
                f"the installed onnxruntime has no {provider.full}",
                hint=f"It comes with: pip install {provider.package.replace(',', '')}",
            )
        return provider, ""
    wanted = next((p for p in PROVIDERS if p.genai and p.genai.lower() == wanted_by_model.lower()), None)
    if wanted and wanted.full in here:
        return wanted, ""
    best = next(p for p in PROVIDERS if p.full in here and p.name in _AUTOMATIC)
    if wanted:
        return best, f"the model was exported for {wanted.name}, which the installed onnxruntime lacks"
    if best is CPU and _has_nvidia():
        return (
            best,
            f"there is an NVIDIA GPU; to use it: pip install {_BY_NAME['cuda'].package.replace(',', '')}",
        )
    return best, ""


def _has_nvidia() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvhost-gpu"))


def choose_engine(asked: str) -> str:
    """`genai` or `onnxruntime`; empty where the target may choose.

    Raises:
        BadInput: it is neither.
    """
    asked = asked or os.environ.get("ALIGHT_ONNX_ENGINE", "")
    if asked and asked not in ENGINES:
        raise BadInput(f"unknown ONNX engine {asked!r}", hint=f"Known: {', '.join(ENGINES)}.")
    return asked
