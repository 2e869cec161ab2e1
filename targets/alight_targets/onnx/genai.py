"""A Backend on onnxruntime-genai: one Generator per sequence.

Its own Engine batches statically: a request that comes late waits for the whole batch. So the scheduler works over
Generators, which compute one after the other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alight.errors import InvalidModelFile, Unsupported
from alight_targets.onnx import runtime
from alight_targets.onnx.backend import OnnxBackend
from alight_targets.onnx.config import PIECE, DecoderConfig
from alight_targets.onnx.runtime import Provider

if TYPE_CHECKING:
    from alight.target import FloatArray


class GenaiBackend(OnnxBackend):
    """
    Args:
        adapters: files (.onnx_adapter) of LoRA adapters by name.

    Raises:
        InvalidModelFile: onnxruntime-genai does not take the model, or an adapter.
    """

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        *,
        provider: Provider,
        context: int,
        slots: int,
        threads: int,
        adapters: Mapping[str, str],
    ) -> None:
        self._genai = runtime.genai()
        self.vocabulary, self.context, self.slots = config.vocabulary, context, slots
        self._hidden_states = config.hidden_states
        self._generators: dict[int, Any] = {}
        settings = self._genai.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        settings.clear_providers()
        if provider.genai:
            settings.append_provider(provider.genai)
        try:
            self._model = self._genai.Model(settings)
        except Exception as error:  # it raises RuntimeError for everything
            raise InvalidModelFile(f"onnxruntime-genai cannot load {folder.name}: {error}") from error
        self.details = {"device": str(self._model.type)}
        self._adapters = self._load_adapters(adapters)

    def _load_adapters(self, files: Mapping[str, str]) -> Any:
        loaded = self._genai.Adapters(self._model)
        for name, file in files.items():
            try:
                loaded.load(file, name)
            except Exception as error:
                raise InvalidModelFile(
                    f"onnxruntime-genai cannot load the adapter {Path(file).name}: {error}",
                    hint="It must be an .onnx_adapter file that was made for this model.",
                ) from error
        return loaded

    def add(self, sequence: int) -> None:
        self._generators[sequence] = self._generator(self.context)

    def _generator(self, length: int) -> Any:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=length, do_sample=False)
        return self._genai.Generator(self._model, params)

    def adapt(self, sequence: int, adapters: Sequence[tuple[str, float]]) -> None:
        if len(adapters) > 1 or adapters[0][1] != 1:
            raise Unsupported(
                f"the ONNX target cannot combine or scale adapters: {adapters}", hint="Use one, at scale 1."
            )
        self._generators[sequence].set_active_adapter(self._adapters, adapters[0][0])

    def remove(self, sequence: int) -> None:
        self._generators.pop(sequence, None)

    def rewind(self, sequence: int, length: int) -> None:
        self._generators[sequence].rewind_to(length)

    def extend(self, sequence: int, tokens: Sequence[int]) -> FloatArray:
        generator = self._generators[sequence]
        for at in range(0, len(tokens), PIECE):
            generator.append_tokens(np.array(tokens[at : at + PIECE], np.int32))
        logits: FloatArray = generator.get_logits()[0, -1]
        return logits

    def decode(self, sequences: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        if len(sequences) == 1:
            return self.extend(sequences[0], tokens)[None]
        return np.stack([self.extend(s, [token]) for s, token in zip(sequences, tokens, strict=True)])

    def logits(self, tokens: Sequence[int]) -> Iterator[FloatArray]:
        for generator, part in self._read(tokens):
            rows = np.asarray(generator.get_output("logits"), np.float32)[0]
            if len(rows) == part:
                yield rows
            else:
                raise Unsupported(
                    "the graph gives the logits of the last token only, so it cannot score a text"
                )

    def hidden(self, tokens: Sequence[int]) -> FloatArray:
        parts = [
            np.asarray(generator.get_output(self._hidden_states), np.float32)[0]
            for generator, _ in self._read(tokens)
        ]
        return np.concatenate(parts)

    def _read(self, tokens: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """A Generator of its own reads a text, piece by piece; it, and the length of each piece."""
        generator = self._generator(max(len(tokens), 2))
        for at in range(0, len(tokens), PIECE):
            part = np.array(tokens[at : at + PIECE], np.int32)
            generator.append_tokens(part)
            yield generator, len(part)

    def close(self) -> None:
        self._generators.clear()
        with contextlib.suppress(AttributeError):
            del self._adapters, self._model
