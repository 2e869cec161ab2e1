"""A loaded model seen through another chat template."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from alight.chat import ChatTemplate
from alight.target import Chunk, Model, Prompt, Sampling, Scores

if TYPE_CHECKING:
    from alight.target import FloatArray


def with_template(model: Model, source: str) -> Model:
    """The model with its template replaced; itself where `source` is empty. Nothing is loaded again."""
    return _View(model, source) if source else model


class _View(Model):
    def __init__(self, model: Model, source: str) -> None:
        own = model.template
        self._model = model
        self.info = model.info
        self.template = ChatTemplate(
            source, bos=own.bos, eos=own.eos, control_tokens=own.control_tokens, vision=own.vision
        )

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk]:
        return self._model.generate(prompt, sampling)

    def score(self, tokens: Sequence[int], *, distribution: bool = False, top: int = 0) -> Scores:
        return self._model.score(tokens, distribution=distribution, top=top)

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        return self._model.tokenize(text, bos=bos, special=special)

    def prompt_tokens(self, pieces: Sequence[str | bytes]) -> list[int | bytes]:
        return self._model.prompt_tokens(pieces)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        return self._model.detokenize(tokens, special=special)

    def embed(self, texts: Sequence[str], *, pooling: str = "") -> FloatArray:
        return self._model.embed(texts, pooling=pooling)

    def close(self) -> None:
        self._model.close()
