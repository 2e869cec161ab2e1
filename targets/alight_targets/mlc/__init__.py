"""The MLC target: models compiled with tvm, on the CPU or a GPU."""

from __future__ import annotations

import importlib.util

import psutil

from alight import devices
from alight.artifact import Artifact
from alight.errors import TargetUnavailable
from alight.folders import folder_of
from alight.target import Availability, LoadOptions, Model, ModelInfo, Target

_EXTRA = "mlc"


class MlcTarget(Target):
    """MLC artifacts, by the library among them that was compiled for this machine."""

    name = "mlc"
    formats = frozenset({"mlc"})

    def probe(self) -> Availability:
        if importlib.util.find_spec("tvm") is None:
            return Availability(False, "apache-tvm is not installed", f"pip install 'alight[{_EXTRA}]'")
        return Availability(True, "apache-tvm is installed")

    def load(self, artifact: Artifact, options: LoadOptions) -> Model:
        here = self.probe()
        if not here.here:
            raise TargetUnavailable(here.reason, hint=f"Run: {here.install}")
        from alight_targets.common.model import BatchedModel
        from alight_targets.common.tokenizer import Tokenizer
        from alight_targets.mlc.backend import TvmBackend
        from alight_targets.mlc.fit import Sizes, fit
        from alight_targets.mlc.libraries import choose

        folder = folder_of(artifact)
        library, sizes = choose(folder), Sizes.of(folder)
        context, slots = fit(sizes, options, library.context, _available(library.device))
        threads = options.threads or psutil.cpu_count(logical=False) or 1
        info = ModelInfo(
            name=artifact.name,
            architecture=sizes.architecture,
            context=context,
            vocabulary=0,  # completed from the backend
            parameters=sizes.parameters,
            target=self.name,
            trained_context=sizes.trained,
            details={
                "quantization": sizes.quantization,
                **({"warning": library.unrun} if library.unrun else {}),
            },
        )
        return BatchedModel(
            lambda: TvmBackend(folder, library, context=context, slots=slots, threads=threads),
            Tokenizer(folder, _EXTRA),
            info,
            options,
            extra=_EXTRA,
        )


def _available(device: str) -> int:
    """Bytes that are free where the model will be."""
    if device == "cpu":
        return devices.available_memory()
    import tvm

    return int(tvm.device(device, 0).available_global_memory or devices.available_memory())


__all__ = ["MlcTarget"]
