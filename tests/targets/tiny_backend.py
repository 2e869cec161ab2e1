"""A Backend in NumPy: a small recurrent network over a byte-level tokenizer trained on the spot."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from alight.target import LoadOptions, ModelInfo
from alight_targets.common.backend import Backend
from alight_targets.common.model import BatchedModel
from alight_targets.common.tokenizer import Tokenizer as OurTokenizer

Array = NDArray[np.float32]
WIDTH = 24
TEXT = ["the small boat went out to sea with bread, water and an old map " * 3, "one two three four five"]


def tokenizer_folder(folder: Path) -> Path:
    """Write the files of a byte-level tokenizer of about 300 tokens, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT, trainer)
    bpe.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


class TinyBackend(Backend):
    """Every state of every sequence is kept, so that rewinding is exact. Counts its work.

    Args:
        forks: whether it can copy a beginning.
        fail_at: the token that makes it fail; -1 is none.
    """

    def __init__(self, vocabulary: int, *, context: int = 64, slots: int = 4, fail_at: int = -1) -> None:
        random = np.random.default_rng(5)
        self.vocabulary, self.context, self.slots = vocabulary, context, slots
        self._embedding = random.normal(0, 1, (vocabulary, WIDTH)).astype(np.float32)
        self._mix = random.normal(0, 0.8 * WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32)
        self._head = random.normal(0, 2, (WIDTH, vocabulary)).astype(np.float32)
        self._states: dict[int, list[Array]] = {}
        self._fail_at = fail_at
        self._thread = threading.get_ident()
        self.read: list[int] = []  # tokens of each extend
        self.batches: list[int] = []  # sequences of each decode
        self.closed = False
        self.gate = threading.Event()  # cleared, it holds every computation up
        self.gate.set()

    def add(self, sequence: int) -> None:
        assert threading.get_ident() == self._thread
        assert sequence not in self._states and 0 <= sequence < self.slots
        self._states[sequence] = [np.zeros(WIDTH, np.float32)]

    def remove(self, sequence: int) -> None:
        del self._states[sequence]

    def rewind(self, sequence: int, length: int) -> None:
        assert length < len(self._states[sequence])
        del self._states[sequence][length + 1 :]

    def extend(self, sequence: int, tokens: Sequence[int]) -> Array:
        assert tokens
        self.read.append(len(tokens))
        return self._advance(self._states[sequence], tokens)[-1]

    def decode(self, sequences: Sequence[int], tokens: Sequence[int]) -> Array:
        assert len(set(sequences)) == len(sequences)
        self.batches.append(len(sequences))
        pairs = zip(sequences, tokens, strict=True)
        return np.stack([self._advance(self._states[s], [token])[0] for s, token in pairs])

    def logits(self, tokens: Sequence[int]) -> Iterator[Array]:
        states = [np.zeros(WIDTH, np.float32)]
        for at in range(0, len(tokens), 5):
            yield np.stack(self._advance(states, tokens[at : at + 5]))

    def close(self) -> None:
        self.closed = True

    def _advance(self, states: list[Array], tokens: Sequence[int]) -> list[Array]:
        assert not self.closed
        self.gate.wait()
        for token in tokens:
            if token == self._fail_at:
                raise RuntimeError("the device is gone")
            states.append(np.tanh(states[-1] @ self._mix + self._embedding[token]))
        assert len(states) - 1 <= self.context
        return [state @ self._head for state in states[-len(tokens) :]]


class ForkingBackend(TinyBackend):
    """The same, and it can copy a beginning."""

    forked = 0

    def fork(self, parent: int, child: int, length: int) -> bool:
        assert child not in self._states
        self._states[child] = self._states[parent][: length + 1]
        self.forked += 1
        return True


def load(
    folder: Path, kind: type[TinyBackend] = TinyBackend, fail_at: int = -1, **options: object
) -> tuple[BatchedModel, TinyBackend]:
    """A model over a TinyBackend, and that."""
    tokenizer = OurTokenizer(tokenizer_folder(folder), "onnx")
    wanted = LoadOptions(**{"context": 64, "slots": 4} | options)  # type: ignore[arg-type]
    info = ModelInfo("tiny", "rnn", 0, 0, 0, "numpy")
    made: list[TinyBackend] = []

    def open_backend() -> Backend:
        made.append(kind(320, context=wanted.context or 64, slots=wanted.slots + 2, fail_at=fail_at))
        return made[0]

    return BatchedModel(open_backend, tokenizer, info, wanted, extra="onnx"), made[0]
