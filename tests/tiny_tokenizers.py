"""Tiny tokenizers trained on the README, each built as the real `tokenizer.json` of a family is."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from alight_converters.tokenizer_files import read_tokenizer

ROOT = Path(__file__).parent.parent
TEXTS = [str(ROOT / "README.md"), str(ROOT / "README.zh-CN.md")]
SIZE = 640

_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
# As in the tokenizer.json of Llama 3, Qwen2, Mistral Nemo, Phi-4-mini and Phi-4.
REGEX = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _END,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _END,
    "tekken": rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|" + _END.replace(r"[\r\n]*", r"[\r\n/]*", 1),
    "gpt-4o": rf"{_CASED[0]}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|{_CASED[1]}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{{N}}{{1,3}}|"
    + _END.replace(r"[\r\n]*", r"[\r\n/]*", 1),
    "dbrx": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]


@cache
def byte_level(kind: str) -> dict[str, Any]:
    """A byte-level BPE: "gpt-2", "smollm", or one of REGEX. "llama3" puts a first token before every text."""
    bpe = Tokenizer(models.BPE(ignore_merges=kind in ("llama3", "tekken")))
    if kind == "qwen2":
        bpe.normalizer = normalizers.NFC()
    if kind == "gpt-2":
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        first = (
            pre_tokenizers.Digits(individual_digits=True)
            if kind == "smollm"
            else pre_tokenizers.Split(Regex(REGEX[kind]), "isolated")
        )
        byte_step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([first, byte_step])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=SIZE - 8, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.add_tokens([AddedToken("<tool_call>", normalized=False)])  # matched always, but no control token
    if kind == "llama3":
        bpe.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
        )
    found: dict[str, Any] = json.loads(bpe.to_str())
    return found


@cache
def sentencepiece_model(*, prefix: bool = True, kind: str = "bpe") -> bytes:
    """A SentencePiece model as Llama 2 (`prefix`) and Gemma (none) have it."""
    with TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            input=TEXTS,
            model_prefix=f"{folder}/tokenizer",
            model_type=kind,
            vocab_size=SIZE - 40,
            byte_fallback=kind == "bpe",
            hard_vocab_limit=False,
            character_coverage=0.98,
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
        return (Path(folder) / "tokenizer.model").read_bytes()


@cache
def pieces(kind: str) -> dict[str, Any]:
    """A SentencePiece BPE as `tokenizer.json`: "llama2", "gemma" (no prefix, as its own files say it) or "phi3"."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(prefix=kind != "gemma"))
        found = read_tokenizer(folder)
    if kind == "gemma":
        found["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        found["pre_tokenizer"] = {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        }  # fmt: skip
    names = ["<start_of_turn>", "<end_of_turn>"]
    if kind == "phi3":
        names = ["<|endoftext|>", "<|user|>", "<|end|>"]
    first = 1 + max(found["model"]["vocab"].values())
    for number, text in enumerate(names, first):
        strips = kind == "phi3" and text != "<|endoftext|>"
        found["added_tokens"].append(
            {"id": number, "content": text, "special": True, "single_word": False, "lstrip": False,
             "rstrip": strips, "normalized": False}
        )  # fmt: skip
    if kind == "phi3":
        next(t for t in found["added_tokens"] if t["content"] == "</s>")["rstrip"] = True
    return found


def write(folder: Path, tokenizer: dict[str, Any]) -> None:
    """Write the files that a checkpoint has of a tokenizer."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    ids = {t["content"] for t in tokenizer["added_tokens"]}
    begin, end = ("<s>", "</s>") if "<s>" in ids else ("<|begin|>", "<|end|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
