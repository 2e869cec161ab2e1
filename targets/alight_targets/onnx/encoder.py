"""Encoder models in ONNX form, as optimum writes them: embeddings, and rerankers with one score for a pair of texts."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alight.artifact import Artifact
from alight.chat import ChatTemplate
from alight.errors import BadInput, ContextExceeded, EngineError, InvalidModelFile, Unsupported
from alight.target import Chunk, LoadOptions, Model, ModelInfo, Prompt, Sampling, Scores
from alight_targets.common.tokenizer import TOKENIZER
from alight_targets.onnx.config import GENAI_CONFIG
from alight_targets.onnx.graph import fallback, open_session
from alight_targets.onnx.pooling import pool, unit
from alight_targets.onnx.runtime import Provider

if TYPE_CHECKING:
    from alight.target import FloatArray

_GRAPH = "model.onnx"
_HIDDEN = ("last_hidden_state", "token_embeddings")
_TEXTS = 16  # in one run


def encoder_graph(folder: Path) -> Path | None:
    """The graph of a model that reads whole texts; None where a folder holds a decoder."""
    config = folder / GENAI_CONFIG
    if not config.is_file():
        return folder / _GRAPH if (folder / _GRAPH).is_file() else None
    model = _read(config).get("model")
    parts = model if isinstance(model, dict) else {}
    files = [part["filename"] for part in parts.values() if isinstance(part, dict) and "filename" in part]
    return folder / str(files[0]) if files and "decoder" not in parts else None


class EncoderModel(Model):
    """A model that reads and does not write.

    Raises:
        InvalidModelFile: a file is missing or damaged, or the graph has no output that is known here.
    """

    def __init__(
        self,
        artifact: Artifact,
        graph: Path,
        options: LoadOptions,
        *,
        provider: Provider,
        note: str,
        threads: int,
    ) -> None:
        from tokenizers import Tokenizer

        folder = graph.parent
        config, pooling = _read(folder / "config.json"), _read(folder / "1_Pooling" / "config.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # tokenizers raises nothing more exact
            raise InvalidModelFile(f"{TOKENIZER} is not usable: {error}", hint="Export it again.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a control token in a text is text
        self._padding = int(config.get("pad_token_id") or 0)
        self._session: Any = open_session(graph, provider, threads)
        self._inputs = {
            i.name: np.int32 if "int32" in i.type else np.int64 for i in self._session.get_inputs()
        }
        outputs = {o.name: o.shape for o in self._session.get_outputs()}
        self._hidden = next((name for name in _HIDDEN if name in outputs), "")
        self._scores = "logits" if outputs.get("logits", [0])[-1] == 1 else ""
        if not (self._hidden or self._scores):
            raise InvalidModelFile(
                f"the graph gives {', '.join(outputs)}",
                hint=f"alight reads {_HIDDEN[0]} (embeddings) and logits of width 1 (rerankers).",
            )
        self._pooling = "cls" if pooling.get("pooling_mode_cls_token") else "mean"
        trained = int(config.get("max_position_embeddings") or 512)
        if str(config.get("model_type", "")).endswith("roberta"):
            trained -= self._padding + 1  # its positions begin after the padding's
        details: dict[str, Any] = {"engine": "onnxruntime", "provider": provider.name, "threads": threads}
        self.info = ModelInfo(
            name=artifact.name,
            architecture=str(config.get("model_type") or artifact.description.architecture),
            context=min(options.context or trained, trained),
            vocabulary=int(config.get("vocab_size") or self._tokenizer.get_vocab_size()),
            parameters=artifact.description.parameters,
            target="onnx",
            trained_context=trained,
            details=details | ({"note": note} if note else {}) | fallback(self._session, provider),
        )
        self.template = ChatTemplate("")

    def embed(self, texts: Sequence[str], *, pooling: str = "") -> FloatArray:
        if not self._hidden:
            raise Unsupported(f"{self.info.name!r} ranks texts and does not embed", hint="Use rerank.")
        return unit([pool(states, pooling or self._pooling) for states in self._run(texts, self._hidden)])

    def rerank(self, query: str, documents: Sequence[str]) -> list[float]:
        if not self._scores:
            return super().rerank(query, documents)
        rows = self._run([(query, document) for document in documents], self._scores)
        return [float(row[0]) for row in rows]

    def _run(self, texts: Sequence[str | tuple[str, str]], output: str) -> list[FloatArray]:
        """An output for each text or pair of texts: of its tokens, or of all of it."""
        self._check_open()
        texts = [
            _clean(text) if isinstance(text, str) else (_clean(text[0]), _clean(text[1])) for text in texts
        ]
        if any(not part for text in texts for part in ([text] if isinstance(text, str) else text)):
            raise BadInput("a text to read is empty", hint="Give at least one token of text.")
        read = [self._encode(text) for text in texts]
        found: list[FloatArray] = []
        for at in range(0, len(read), _TEXTS):
            some = read[at : at + _TEXTS]
            length = max(len(one.ids) for one in some)

            def padded(
                which: str, value: int, some: list[Any] = some, length: int = length
            ) -> list[list[int]]:
                return [[*getattr(one, which), *[value] * (length - len(one.ids))] for one in some]

            feed = {
                "input_ids": padded("ids", self._padding),
                "attention_mask": padded("attention_mask", 0),
                "token_type_ids": padded("type_ids", 0),
            }
            inputs = {
                name: np.array(rows, self._inputs[name])
                for name, rows in feed.items()
                if name in self._inputs
            }
            (made,) = self._session.run([output], inputs)
            found += [
                np.asarray(row if made.ndim == 2 else row[: len(one.ids)], np.float32)
                for row, one in zip(made, some, strict=True)
            ]
        return found

    def _encode(self, text: str | tuple[str, str]) -> Any:
        first, second = (text, None) if isinstance(text, str) else text
        encoded = self._tokenizer.encode(first, second)
        if len(encoded.ids) > self.info.context:
            raise ContextExceeded(len(encoded.ids), self.info.context)
        return encoded

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        self._check_open()
        return list(self._tokenizer.encode(text, add_special_tokens=bos).ids)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        self._check_open()
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=not special)
        return text.encode()

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk]:
        raise self._only_reads()

    def score(self, tokens: Sequence[int], *, distribution: bool = False, top: int = 0) -> Scores:
        raise self._only_reads()

    def close(self) -> None:
        self._session = None

    def _only_reads(self) -> Unsupported:
        does = "embeds" if self._hidden else "ranks"
        return Unsupported(
            f"{self.info.name!r} {does} texts and writes none", hint="Load a language model to chat."
        )

    def _check_open(self) -> None:
        if self._session is None:
            raise EngineError(f"model {self.info.name!r} is closed", hint="Load it again.")


def _clean(text: str) -> str:
    """Without lone surrogates, which the tokenizer refuses."""
    return text.encode(errors="replace").decode()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModelFile(f"{path} is not usable: {error}", hint="Export it again.") from error
    return data if isinstance(data, dict) else {}
