"""Embeddings and ranking scores: a context of their own, opened for one call."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from alight.errors import BadInput, ContextExceeded
from alight_targets.llama_cpp.native import POOLING, NativeContext, NativeModel

_BATCH = 2048  # tokens in one pass; a text must fit whole
_TEXTS = 64  # texts in one pass


def embed(
    model: NativeModel, texts: Sequence[list[int]], *, pooling: str, threads: int, flash_attention: bool
) -> Generator[None, None, NDArray[np.float32]]:
    """Unit-length embeddings of tokenized texts, shape (len(texts), width); or raw scores with pooling "rank",
    shape (len(texts), 1). Yields after each pass, so that others get their turn."""
    if pooling and pooling not in POOLING:
        raise BadInput(f"pooling is {pooling!r}", hint=f"It must be one of {', '.join(POOLING)}.")
    limit = min(_BATCH, model.trained_context or _BATCH)
    for text in texts:
        if not text:
            raise BadInput("a text to embed is empty", hint="Give at least one token of text.")
        if len(text) > limit:
            raise ContextExceeded(len(text), limit)
    width = 1 if pooling == "rank" else model.width
    out = np.empty((len(texts), width), np.float32)
    if not texts:
        return out
    context = NativeContext(
        model,
        # llama.cpp reserves room for a multiple of the sequences, and aborts where the batch is none.
        context=min(_BATCH, -(-sum(map(len, texts)) // _TEXTS) * _TEXTS),
        batch=_BATCH,
        outputs=_BATCH,
        threads=threads,
        sequences=_TEXTS,
        flash_attention=flash_attention,
        pooling=pooling or model.pooling or "mean",
    )
    try:
        for rows in _passes(texts, context.batch):
            tokens = [t for i in rows for t in texts[i]]
            positions = [p for i in rows for p in range(len(texts[i]))]
            sequences = [s for s, i in enumerate(rows) for _ in texts[i]]
            context.decode(tokens, positions, sequences, [True] * len(tokens))
            for sequence, i in enumerate(rows):
                out[i] = context.embedding(sequence, width)
                context.forget(sequence)
            yield
    finally:
        context.close()
    if pooling != "rank":
        out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
    return out


def _passes(texts: Sequence[list[int]], room: int) -> list[list[int]]:
    """Indexes of texts that go through the model together."""
    passes: list[list[int]] = [[]]
    used = 0
    for i, text in enumerate(texts):
        if passes[-1] and (used + len(text) > room or len(passes[-1]) == _TEXTS):
            passes.append([])
            used = 0
        passes[-1].append(i)
        used += len(text)
    return passes
