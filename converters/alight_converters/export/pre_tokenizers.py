"""How a byte-level BPE cuts text into words before it merges: `tokenizer.json` writes it out, GGUF has names.

llama.cpp's own script finds the name by a hash of the tokens of a probe text, which knows only the models
that somebody listed. Here the pre-tokenizer itself is compared, so every model that uses a known one works.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alight.errors import Unsupported

Json = Mapping[str, Any]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_SLASH}"
_GPT4O = rf"{_CASED[0]}{_SUFFIX}?|{_CASED[1]}{_SUFFIX}?|\p{{N}}{{1,3}}|{_REST_SLASH}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to cut.

    Attributes:
        name: what we write as `tokenizer.ggml.pre`.
        patterns: applied one after the other; every match is a piece, and so is what lies between.
        ignore_merges: llama.cpp takes a whole word that is in the vocabulary without merging.
        aliases: other names in llama.cpp for the same.
    """

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    aliases: tuple[str, ...] = ()


KNOWN = (
    PreTokenizer("gpt-2", (_GPT2,), aliases=("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")),
    PreTokenizer(
        "smollm",
        (_DIGIT, _GPT2),
        aliases=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    PreTokenizer("qwen2", (_QWEN2,), aliases=("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan")),
    PreTokenizer("llama-bpe", (_LLAMA3,), ignore_merges=True, aliases=("llama3", "llama-v3")),
    PreTokenizer("dbrx", (_LLAMA3,), aliases=("smaug-bpe",)),
    PreTokenizer("tekken", (_TEKKEN,), ignore_merges=True),
    PreTokenizer("gpt-4o", (_GPT4O,), aliases=("llama4", "kanana2")),
)

# Spellings that match the same text: possessive quantifiers, and contractions written in another order.
_SPELLINGS = (
    ("?+", "?"),
    ("++", "+"),
    (r"'(?i:[sdmt]|ll|ve|re)", _SUFFIX),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _SUFFIX),
    (r"\p{N}{1}", r"\p{N}"),
)


def find(tokenizer: Json) -> list[PreTokenizer]:
    """The pre-tokenizers of llama.cpp that cut as this `tokenizer.json` does; they differ in `ignore_merges`.

    Raises:
        Unsupported: llama.cpp has none that is the same.
    """
    patterns = _patterns(tokenizer.get("pre_tokenizer"))
    found = [known for known in KNOWN if known.patterns == patterns]
    if not found:
        raise Unsupported(
            f"the tokenizer splits text by {' then '.join(map(repr, patterns)) or 'nothing'}, "
            "for which alight knows no llama.cpp pre-tokenizer",
            hint="If llama.cpp has it, add it to KNOWN in alight_converters/export/pre_tokenizers.py.",
        )
    return found


def by_name(name: str) -> PreTokenizer:
    """The pre-tokenizer that a GGUF names. Raises Unsupported for an unknown one."""
    for known in KNOWN:
        if name == known.name or name in known.aliases:
            return known
    raise Unsupported(
        f"the GGUF's pre-tokenizer {name!r} is not one that alight knows",
        hint=f"Known: {', '.join(k.name for k in KNOWN)}. Give the original Hugging Face checkpoint.",
    )


def to_json(pre: PreTokenizer) -> dict[str, Any]:
    """The `pre_tokenizer` entry of a `tokenizer.json`."""
    steps: list[dict[str, Any]] = []
    for pattern in pre.patterns:
        if pattern == _DIGIT:
            steps.append({"type": "Digits", "individual_digits": True})
        elif pattern != _GPT2:
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            steps.append(split)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps.append(byte_level | {"use_regex": _GPT2 in pre.patterns})
    return {"type": "Sequence", "pretokenizers": steps}


def _patterns(step: Json | None) -> tuple[str, ...]:
    """A pre-tokenizer as the patterns that it applies. Raises Unsupported for what cannot be said so."""
    kind = step["type"] if step else ""
    if step is None or kind == "Sequence":
        return tuple(p for inner in (step or {}).get("pretokenizers", ()) for p in _patterns(inner))
    if kind == "Digits" and step.get("individual_digits"):
        return (_DIGIT,)
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return (_GPT2,) if step.get("use_regex", True) else ()
    if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
        pattern = step["pattern"].get("Regex", "")
        for theirs, ours in _SPELLINGS:
            pattern = pattern.replace(theirs, ours)
        return (pattern,)
    # llama.cpp's Falcon-like ones, Chinese scripts one by one, prefixed spaces and so on.
    raise Unsupported(
        f"the tokenizer's step {dict(step)} has no counterpart in llama.cpp that alight knows",
        hint="If llama.cpp has it, add it to KNOWN in alight_converters/export/pre_tokenizers.py.",
    )
