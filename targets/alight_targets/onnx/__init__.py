"""ONNX artifacts, on onnxruntime-genai or plain onnxruntime, with the execution provider that fits the device."""

from __future__ import annotations

import logging

import psutil

from alight import devices
from alight.artifact import Artifact
from alight.errors import BadInput
from alight.folders import folder_of
from alight.target import Availability, LoadOptions, Model, ModelInfo, Target
from alight_targets.onnx import runtime

log = logging.getLogger("alight.onnx")

_KV_BYTES = 4  # float32, the widest that graphs have


class OnnxTarget(Target):
    """ONNX Runtime.

    Args:
        engine: `genai` or `onnxruntime`; by default ALIGHT_ONNX_ENGINE, or what suits the model.
        provider: an execution provider by name, such as "cuda"; by default ALIGHT_ONNX_PROVIDER, or the best one here.
    """

    name = "onnx"
    formats = frozenset({"onnx"})

    def __init__(self, engine: str = "", provider: str = "") -> None:
        self._engine = engine
        self._provider = provider

    def probe(self) -> Availability:
        missing = [m for m in ("onnxruntime", "tokenizers") if not runtime.is_installed(m)]
        if missing:
            return Availability(False, f"{missing[0]} is not installed", runtime.INSTALL)
        return Availability(True, "onnxruntime is installed")

    def load(self, artifact: Artifact, options: LoadOptions) -> Model:
        from alight_targets.onnx.config import DecoderConfig, weight_bytes
        from alight_targets.onnx.encoder import EncoderModel, encoder_graph

        folder = folder_of(artifact)
        threads = options.threads or psutil.cpu_count(logical=False) or 1
        if graph := encoder_graph(folder):
            provider, word = self._choose_provider("")
            return EncoderModel(artifact, graph, options, provider=provider, note=word, threads=threads)

        from alight_targets.common.tokenizer import Tokenizer
        from alight_targets.onnx.memory import fit
        from alight_targets.onnx.model import OnnxModel, choose_engine, describe

        config = DecoderConfig.read(folder)
        if options.context and options.context > config.context:
            raise BadInput(
                f"context {options.context} is longer than the {config.context} tokens {artifact.name!r} "
                "was trained for",
                hint=f"Use --context {config.context} or less.",
            )
        provider, word = self._choose_provider(config.provider)
        engine = choose_engine(self._engine, config, provider, options)
        context, sequences = fit(
            artifact.name,
            weights=weight_bytes(folder),
            kv_per_token=config.kv_numbers * _KV_BYTES,
            vocabulary=config.vocabulary,
            trained=config.context,
            wanted=options.context,
            slots=options.slots,
            available=devices.available_memory(),
        )
        info = ModelInfo(
            name=artifact.name,
            architecture=artifact.description.architecture or config.kind,
            context=context,
            vocabulary=config.vocabulary,
            parameters=artifact.description.parameters,
            target=self.name,
            trained_context=config.context,
            details=describe(engine, provider, word, threads),
        )
        return OnnxModel(
            folder,
            config,
            Tokenizer(folder, "onnx"),
            info,
            options,
            engine=engine,
            provider=provider,
            context=context,
            sequences=sequences,
            threads=threads,
        )

    def _choose_provider(self, wanted_by_model: str) -> tuple[runtime.Provider, str]:
        provider, word = runtime.choose_provider(self._provider, wanted_by_model)
        if word:
            log.warning("%s; it runs on the %s", word, provider.name)
        return provider, word


__all__ = ["OnnxTarget"]
