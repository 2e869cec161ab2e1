"""Whether a model fits into memory, predicted before it is loaded."""

from __future__ import annotations

from alight.errors import DoesNotFit
from alight.planner import DEFAULT_CONTEXT, RESERVE, SMALLEST_CONTEXT
from alight_targets.onnx.config import PIECE

KEPT = 8  # finished conversations that stay in the KV cache, beside those that run
# Python, NumPy and onnxruntime, and of the tokenizer per token: estimates, on the safe side.
_RUNTIME_BYTES = 90_000_000
_VOCABULARY_BYTES = 600


def fit(
    what: str,
    *,
    weights: int,
    kv_per_token: int,
    vocabulary: int,
    trained: int,
    wanted: int | None,
    slots: int,
    available: int,
) -> tuple[int, int]:
    """The context to load with, and how many sequences of that length.

    Every sequence has a buffer of its own, as long as the context. Fewer sequences are kept where memory is
    short, down to one; then the default context shrinks. One that was asked for never does.

    Args:
        weights: bytes. kv_per_token: bytes of keys and values. wanted: tokens, None for the default.
        slots: sequences that are to run at once. available: bytes.

    Raises:
        DoesNotFit: with the numbers.
    """
    usable = int(available * (1 - RESERVE))
    # The logits of a piece of a prompt are the largest of what a step computes.
    fixed = weights + _RUNTIME_BYTES + vocabulary * (_VOCABULARY_BYTES + 4 * PIECE)
    context = wanted or min(DEFAULT_CONTEXT, trained or DEFAULT_CONTEXT)
    while fixed + context * kv_per_token > usable:
        if wanted or context // 2 < SMALLEST_CONTEXT:
            needed = fixed + context * kv_per_token
            raise DoesNotFit(f"{what} with a context of {context} tokens", needed, usable)
        context //= 2
    room = (usable - fixed) // max(1, context * kv_per_token)
    return context, max(1, min(slots + KEPT, int(room)))
