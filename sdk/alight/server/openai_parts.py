"""Pieces of OpenAI's answers that several of its endpoints share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alight.server.stream import to_json
from alight.target import TokenLogprob, Usage


def event(data: dict[str, Any], name: str = "") -> bytes:
    """A server-sent event."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + to_json(data) + b"\n\n"


def usage_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """What the answers of a request took.

    Args:
        usages: one for each prompt, with the tokens of all answers to it.
    """
    prompt = sum(usage.prompt_tokens for usage in usages)
    made = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities as chat and responses have them."""

    def entry(text: bytes, logprob: float) -> dict[str, Any]:
        return {"token": text.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(text)}

    return [
        entry(token.text, token.logprob)
        | {"top_logprobs": [entry(text, logprob) for _, text, logprob in token.top]}
        for token in tokens
    ]


class TextLogprobs:
    """Log-probabilities as completions have them; counts the offsets into the text."""

    def __init__(self) -> None:
        self._seen = b""

    def of(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(len(self._seen.decode(errors="ignore")))
            self._seen += token.text
        return {
            "tokens": [token.text.decode(errors="replace") for token in tokens],
            # There is none for a text's very first token, which follows nothing.
            "token_logprobs": [None if math.isnan(t.logprob) else _finite(t.logprob) for t in tokens],
            "top_logprobs": [
                {text.decode(errors="replace"): _finite(logprob) for _, text, logprob in token.top}
                if token.top
                else None
                for token in tokens
            ],
            "text_offset": offsets,
        }


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; it is OpenAI's "very unlikely", too
