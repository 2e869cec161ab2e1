"""A decoder in ONNX form: the shared batching over one of three backends, and embeddings from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alight.errors import BadInput, ContextExceeded, Unsupported
from alight.target import LoadOptions, ModelInfo
from alight_targets.common.model import BatchedModel
from alight_targets.common.tokenizer import Tokenizer
from alight_targets.onnx import runtime
from alight_targets.onnx.backend import OnnxBackend
from alight_targets.onnx.config import DecoderConfig
from alight_targets.onnx.pooling import pool, unit
from alight_targets.onnx.runtime import CPU, Provider

if TYPE_CHECKING:
    from alight.target import FloatArray


class OnnxModel(BatchedModel):
    """
    Args:
        context, sequences: tokens of one sequence, and how many sequences of them memory holds.
        engine: `genai` or `onnxruntime`.
    """

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        tokenizer: Tokenizer,
        info: ModelInfo,
        options: LoadOptions,
        *,
        engine: str,
        provider: Provider,
        context: int,
        sequences: int,
        threads: int,
    ) -> None:
        def open_backend() -> OnnxBackend:
            self._backend = _open(
                folder, config, options, engine, provider, context=context, slots=sequences, threads=threads
            )
            return self._backend

        super().__init__(open_backend, tokenizer, info, options, extra="onnx")
        self._hidden_states = config.hidden_states

    def embed(self, texts: Sequence[str], *, pooling: str = "") -> FloatArray:
        if not self._hidden_states:
            raise Unsupported(
                f"{self.info.name!r} gives no hidden states, so it does not embed",
                hint="Use an embedding model, or export it with its hidden states as an output.",
            )
        ids = [self.tokenize(text, bos=True) for text in texts]
        for text in ids:
            if not text:
                raise BadInput("a text to embed is empty", hint="Give at least one token of text.")
            if len(text) > self.info.context:
                raise ContextExceeded(len(text), self.info.context)
        return unit([pool(self._hidden(text), pooling or "mean") for text in ids])

    def _hidden(self, tokens: list[int]) -> FloatArray:
        return self._scheduler.call(lambda: self._backend.hidden(tokens))


def _open(
    folder: Path,
    config: DecoderConfig,
    options: LoadOptions,
    engine: str,
    provider: Provider,
    *,
    context: int,
    slots: int,
    threads: int,
) -> OnnxBackend:
    if engine == "genai":
        from alight_targets.onnx.genai import GenaiBackend

        return GenaiBackend(
            folder,
            config,
            provider=provider,
            context=context,
            slots=slots,
            threads=threads,
            adapters=dict(options.adapters),
        )
    from alight_targets.onnx.graph import Graph
    from alight_targets.onnx.grown import GrownBackend
    from alight_targets.onnx.rows import RowsBackend

    graph = Graph(config, provider, threads)
    if config.shares_buffer and provider is CPU:
        return RowsBackend(graph, context=context, slots=slots)
    return GrownBackend(graph, context=context, slots=slots)


def choose_engine(asked: str, config: DecoderConfig, provider: Provider, options: LoadOptions) -> str:
    """`genai` or `onnxruntime`, for this model.

    On the CPU plain onnxruntime decodes all requests in one run, which genai's Generators do not; elsewhere genai
    keeps keys and values on the device.

    Raises:
        Unsupported: the engine that was asked for cannot do it. BadInput: there is no such engine.
    """
    engine = runtime.choose_engine(asked)
    needs_genai = "LoRA adapters" if options.adapters else "a window of keys" if config.windowed else ""
    lacks_genai = provider is not CPU and not provider.genai
    if not engine:
        batches = provider is CPU and config.shares_buffer
        wanted = "onnxruntime" if lacks_genai or (batches and not needs_genai) else "genai"
        here = runtime.is_installed("onnxruntime_genai")
        engine = wanted if here or needs_genai else "onnxruntime"
    if engine == "onnxruntime" and needs_genai:
        raise Unsupported(
            f"plain onnxruntime has no {needs_genai} here",
            hint="Set ALIGHT_ONNX_ENGINE=genai, or leave it out.",
        )
    if engine == "genai" and lacks_genai:
        raise Unsupported(
            f"onnxruntime-genai has no {provider.name}", hint="Set ALIGHT_ONNX_ENGINE=onnxruntime."
        )
    return engine


def describe(engine: str, provider: Provider, word: str, threads: int) -> dict[str, object]:
    """What people are told about how a model runs."""
    told: dict[str, object] = {"engine": engine, "provider": provider.name, "threads": threads}
    if word:
        told["note"] = word
    elif engine == "onnxruntime" and provider is not CPU:
        told["note"] = "keys and values stay in host memory; onnxruntime-genai keeps them on the device"
    return told
