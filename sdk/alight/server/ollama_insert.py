"""Filling in: what stands between a prompt and a suffix, for models that were trained for it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from alight.artifact import Artifact
from alight.gguf import read_header
from alight.server.failures import Refused
from alight.server.manager import Offer
from alight.server.ollama_template import insert_template
from alight.server.ollama_view import with_template
from alight.target import Model, without_images

# The marks before the prompt, before the suffix and before what is to be filled in: the header's keys, and
# the texts that models use whose header has none.
_KEYS = (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle"))
_TEXTS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma, Granite 3
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


def insert_tokens(model: Model, offer: Offer, template: str, prompt: str, suffix: str) -> list[int]:
    """The tokens that ask for what stands between `prompt` and `suffix`.

    Args:
        template: in Ollama's language; used where it has a `.Suffix`.

    Raises:
        Refused: 400, the model cannot.
    """
    if source := insert_template(template):
        messages = [{"role": "user", "content": text} for text in (prompt, suffix)]
        return without_images(with_template(model, source).chat_tokens(messages), model.info.name)
    marks = insert_marks(offer.artifact)
    if marks is None:
        raise Refused(400, f'"{offer.name}" does not support insert', code="unsupported", param="suffix")
    before, after, middle = marks
    start = model.tokenize("", bos=True)
    return [*start, before, *model.tokenize(prompt), after, *model.tokenize(suffix), middle]


def insert_marks(artifact: Artifact | None) -> tuple[int, ...] | None:
    """The three tokens of a model that was trained to fill in; None for others."""
    if artifact is None or artifact.format != "gguf":
        return None
    return _marks(artifact.weights[0], artifact.modified)


@lru_cache(maxsize=16)
def _marks(file: Path, modified: float) -> tuple[int, ...] | None:  # noqa: ARG001
    meta = read_header(file).metadata
    named = [
        meta.get(f"tokenizer.ggml.{a}_token_id", meta.get(f"tokenizer.ggml.{b}_token_id")) for a, b in _KEYS
    ]
    if all(isinstance(token, int) for token in named):
        return tuple(named)
    vocabulary = meta.get("tokenizer.ggml.tokens")
    places = {text: i for i, text in enumerate(vocabulary)} if isinstance(vocabulary, list) else {}
    return next(
        (tuple(places[text] for text in texts) for texts in _TEXTS if set(texts) <= set(places)), None
    )
