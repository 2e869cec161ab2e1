"""The tokenizer of a GGUF as a checkpoint's files."""

from __future__ import annotations

import json
from typing import Any

from gguf import TokenType

from alight.errors import InvalidModelFile, Unsupported
from alight.gguf import GGUFHeader
from alight_converters.export import pre_tokenizers
from alight_converters.tokenizer_files import SETTINGS, TOKENIZER, added_token, byte_level, pieces

_ALWAYS_BOS = ("llama-bpe", "tekken")  # llama.cpp puts a first token for these where the file does not say
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)


def tokenizer_files(header: GGUFHeader) -> dict[str, str]:
    """Name -> content of `tokenizer.json`, `tokenizer_config.json` and, where there is one, the chat template.

    Raises:
        InvalidModelFile: no tokenizer, or a broken one. Unsupported: of a kind that alight does not know.
    """
    said = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in header.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens, types = said.get("tokens"), said.get("token_type")
    if not tokens or not types or len(tokens) != len(types):
        raise InvalidModelFile("the GGUF has no complete vocabulary", hint="Give the original checkpoint.")
    texts = {key: tokens[n] for key in ("bos", "eos", "unknown", "padding")
             if (n := said.get(f"{key}_token_id")) is not None and n < len(tokens)}  # fmt: skip
    ids = {t: n for n, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != TokenType.UNUSED}
    added = [
        added_token(text, n, special=types[n] in _SPECIAL)
        for text, n in ids.items()
        if types[n] in (*_SPECIAL, TokenType.USER_DEFINED)
    ]
    if said.get("model") == "gpt2":
        tokenizer = _byte_level(said, ids, added, texts)
    elif said.get("model") == "llama":
        tokenizer = _pieces(said, ids, types, added, texts)
    else:
        raise Unsupported(
            f"the GGUF's tokenizer is of kind {said.get('model')!r}",
            hint="alight reads 'gpt2' and 'llama'. Give the original Hugging Face checkpoint.",
        )
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {f"{names[key]}_token": text for key, text in texts.items()}
    files = {TOKENIZER: json.dumps(tokenizer, ensure_ascii=False), SETTINGS: json.dumps(settings, indent=2)}
    if template := header.metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    return files


def _byte_level(
    said: dict[str, Any], ids: dict[str, int], added: list[dict[str, Any]], texts: dict[str, str]
) -> dict[str, Any]:
    pre = pre_tokenizers.by_name(str(said.get("pre", "")))
    bos = said.get("add_bos_token", pre.name in _ALWAYS_BOS)
    merges = [merge.split(" ", 1) for merge in said.get("merges", ())]
    return byte_level(
        ids, merges, added, pre_tokenizers.to_json(pre),
        ignore_merges=pre.ignore_merges,
        bos=texts.get("bos", "") if bos else "",
    )  # fmt: skip


def _pieces(
    said: dict[str, Any],
    ids: dict[str, int],
    types: list[int],
    added: list[dict[str, Any]],
    texts: dict[str, str],
) -> dict[str, Any]:
    scores = {text: said["scores"][n] for text, n in ids.items() if types[n] == TokenType.NORMAL}
    return pieces(
        scores, ids, added,
        unknown=texts.get("unknown", ""),
        prefix=said.get("add_space_prefix", True),
        bos=texts.get("bos", "") if said.get("add_bos_token", True) else "",
    )  # fmt: skip
