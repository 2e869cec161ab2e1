"""llama.cpp targets: GGUF artifacts on the processor of this machine."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import psutil

from alight import devices, openmp
from alight.artifact import Artifact
from alight.errors import BadInput, DoesNotFit
from alight.planner import fit_context, memory, shape_of_gguf
from alight.target import Availability, LoadOptions, Model, Target

openmp.calm()  # before any module here loads llama.cpp

log = logging.getLogger("alight.llama_cpp")

LEFT_FREE = 16_000_000  # bytes that must be left once a model is loaded


class CpuTarget(Target):
    """llama.cpp on the CPU, x86-64 or Arm."""

    name = "cpu"
    formats = frozenset({"gguf"})

    def probe(self) -> Availability:
        if importlib.util.find_spec("llama_cpp") is None:
            return Availability(
                False, "llama-cpp-python is not installed", "pip install llama-cpp-python==0.3.36"
            )
        return Availability(True, "llama-cpp-python is installed")

    def load(self, artifact: Artifact, options: LoadOptions) -> Model:
        from alight_targets.llama_cpp.model import KEPT, LlamaCppModel

        shape = shape_of_gguf([artifact.header()])
        wanted = options.context
        if wanted and shape.trained_context and wanted > shape.trained_context:
            raise BadInput(
                f"context {wanted} is longer than the {shape.trained_context} tokens {artifact.name!r} was trained for",
                hint=f"Use --context {shape.trained_context} or less.",
            )
        outputs = options.slots + KEPT
        available = devices.available_memory()
        if options.projector and (eyes := Path(options.projector)).is_file():
            available -= eyes.stat().st_size
        context = fit_context(shape, wanted, available, kv_type=options.kv_type, outputs=outputs)
        threads = options.threads or psutil.cpu_count(logical=False) or 1
        predicted = memory(shape, context=context, kv_type=options.kv_type, outputs=outputs).total
        model = LlamaCppModel(artifact, options, context=context, threads=threads, target=self.name)
        left = devices.available_memory()
        if left < LEFT_FREE:  # the prediction was wrong, or others took it meanwhile
            model.close()
            taken = available - left + LEFT_FREE
            raise DoesNotFit(f"{artifact.name!r} with a context of {context} tokens", taken, available)
        log.debug("%s: %d bytes predicted, %d taken", artifact.name, predicted, available - left)
        return model


__all__ = ["CpuTarget"]
