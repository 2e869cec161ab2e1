"""Speculative decoding: cheap guesses of the next tokens, checked by the model in one batch.

Only tokens that the model itself chooses are kept, so greedy text is the same with and without. Prompt
lookup: Saxena 2023; draft models: Leviathan et al., https://arxiv.org/abs/2211.17192.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from alight.errors import BadInput
from alight_targets.llama_cpp.native import NativeContext, NativeModel
from alight_targets.llama_cpp.request import Request

DRAFT = 5  # tokens that a draft model guesses ahead
_NGRAM = 3  # tokens that must repeat before what followed them is guessed again


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again."""

    def __init__(self, most: int) -> None:
        self._most = most

    def propose(self, requests: Sequence[Request]) -> None:
        for request in requests:
            left = request.limit - request.made - 1
            guess = lookup(request.tokens, min(self._most, left)) if left > 0 else []
            request.draft = [*takewhile(lambda token: token >= 0, guess)]  # an image cannot be said

    def forget(self, request: Request) -> None:
        pass


def lookup(tokens: list[int], most: int) -> list[int]:
    """What followed the latest earlier place of the last `_NGRAM` tokens, `most` tokens of it."""
    if len(tokens) <= _NGRAM:
        return []
    end = tokens[-_NGRAM:]
    last = end[-1]
    for at in range(len(tokens) - 2, _NGRAM - 2, -1):
        if tokens[at] == last and tokens[at - _NGRAM + 1 : at + 1] == end:
            return tokens[at + 1 : at + 1 + most]
    return []


class DraftModel:
    """A smaller model with the same vocabulary guesses ahead, for all requests in one batch."""

    def __init__(
        self, file: Path, model: NativeModel, *, context: int, slots: int, batch: int, threads: int
    ) -> None:
        self._model = NativeModel([file])
        if self._model.vocabulary != model.vocabulary:
            own, other = self._model.vocabulary, model.vocabulary
            self._model.close()
            raise BadInput(
                f"the draft model {file.name} has a vocabulary of {own}, the model one of {other}",
                hint="Both must share a tokenizer.",
            )
        self._context = NativeContext(
            self._model, context=context, batch=batch, outputs=slots, threads=threads, sequences=slots
        )
        self._free = list(range(slots))
        self._held: dict[Request, tuple[int, list[int]]] = {}  # sequence, and the tokens in its cache

    def propose(self, requests: Sequence[Request]) -> None:
        # (The draft model sees no images.)
        able = [r for r in requests if r.limit - r.made > 1 and not r.images]
        drafting = [r for r in able if r in self._held or self._free]
        for request in drafting:
            if not self._read(request):
                request.draft = []
                return
        pending = [r for r in drafting if r.draft]
        for _ in range(DRAFT - 1):
            pending = [r for r in pending if len(r.draft) < r.limit - r.made - 1]
            if not pending or not self._step(pending):
                return

    def forget(self, request: Request) -> None:
        sequence, _ = self._held.pop(request, (-1, []))
        if sequence >= 0:
            self._context.forget(sequence)
            self._free.append(sequence)

    def close(self) -> None:
        self._context.close()
        self._model.close()

    def _read(self, request: Request) -> bool:
        """Bring the draft's cache up to the request's tokens; the first guess follows from the last one."""
        sequence, held = self._held.get(request) or (self._free.pop(), [])
        same = 0
        while same < len(held) and same < len(request.tokens) - 1 and held[same] == request.tokens[same]:
            same += 1
        if same < len(held):
            self._context.forget(sequence, same)
        rest = request.tokens[same:]
        for at in range(0, len(rest), self._context.batch):
            part = rest[at : at + self._context.batch]
            places = range(same + at, same + at + len(part))
            if not self._context.decode(
                part, list(places), [sequence] * len(part), [False] * (len(part) - 1) + [True]
            ):
                self._held[request] = (sequence, [])
                self.forget(request)
                return False
            guess = int(self._context.logits(len(part) - 1).argmax())
        self._held[request] = (sequence, list(request.tokens))
        request.draft = [guess]
        return True

    def _step(self, requests: list[Request]) -> bool:
        """One more guess for each."""
        rows = [(r.draft[-1], len(self._held[r][1]), self._held[r][0]) for r in requests]
        tokens, positions, sequences = (list(column) for column in zip(*rows, strict=True))
        if not self._context.decode(tokens, positions, sequences, [True] * len(rows)):
            return False
        for index, request in enumerate(requests):
            self._held[request][1].append(request.draft[-1])
            request.draft.append(int(self._context.logits(index).argmax()))
        return True
