"""The tokenizer of a checkpoint as the content of a `tokenizer.json`, whichever files it has.

A `tokenizer.json` is Hugging Face's description of a whole tokenizer; older checkpoints, and those that bring
code of their own, have a SentencePiece `tokenizer.model` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alight.errors import BadInput, InvalidModelFile, Unsupported

TOKENIZER, SETTINGS, PIECES = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
TEMPLATE = "chat_template.jinja"
SPACE = "▁"  # SentencePiece's stand-in


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The content of the folder's `tokenizer.json`, or the same made from its `tokenizer.model`.

    Raises:
        BadInput: the folder has neither. InvalidModelFile: a file is damaged. Unsupported: a SentencePiece
        model of another kind than BPE.
    """
    if (folder / TOKENIZER).is_file():
        return read_json(folder / TOKENIZER)
    if (folder / PIECES).is_file():
        return _of_sentencepiece(folder)
    raise BadInput(
        f"{folder} has no tokenizer: neither {TOKENIZER} nor {PIECES}",
        hint="Copy the tokenizer's files from the model that it was made from.",
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`; empty where there is none."""
    return read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}


def read_template(folder: Path) -> str:
    """The chat template, from any of the places where it may be; empty where there is none."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    template = read_settings(folder).get("chat_template")
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t["name"] == "default"), "")
    return template or ""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises InvalidModelFile for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidModelFile(f"{file} is not JSON: {error}", hint="Download it again.") from error
    if not isinstance(found, dict):
        raise InvalidModelFile(f"{file} holds a {type(found).__name__}, not an object")
    return found


def token_text(token: str | Mapping[str, Any] | None) -> str:
    """A token as `tokenizer_config.json` gives it: its text, or an object that has it."""
    return str(token["content"]) if isinstance(token, Mapping) else token or ""


def byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: list[dict[str, Any]],
    pre_tokenizer: dict[str, Any],
    *,
    ignore_merges: bool,
    bos: str,
) -> dict[str, Any]:
    """A byte-level BPE as `tokenizer.json`; `bos` is put before every text unless it is empty."""
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": ignore_merges}
    return _tokenizer(model, added, bos, normalizer=None, pre_tokenizer=pre_tokenizer, decoder=step)


def pieces(
    scores: Mapping[str, float],
    ids: Mapping[str, int],
    added: list[dict[str, Any]],
    *,
    unknown: str,
    prefix: bool,
    bos: str,
) -> dict[str, Any]:
    """A SentencePiece BPE as `tokenizer.json`.

    Args:
        scores: of the pieces that arise by merging; the best pair is merged first.
        ids: of all pieces. added: `added_tokens` as in `tokenizer.json`.
        prefix: text begins with a space that nobody wrote. bos: put before every text; may be empty.
    """
    to_marks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    to_spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = {
        "type": "BPE",
        "vocab": dict(ids),
        "merges": merges_of(scores, ids),
        "unk_token": unknown or None,
        "fuse_unk": True,
        "byte_fallback": True,
    }
    decoders = [to_spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]
    return _tokenizer(
        model, added, bos,
        normalizer={"type": "Sequence", "normalizers": [*before, to_marks]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
    )  # fmt: skip


def merges_of(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[list[str]]:
    """SentencePiece merges any two neighbours that make a piece, the best piece first: the same as ranked pairs."""
    return [
        [piece[:cut], piece[cut:]]
        for piece in sorted(scores, key=lambda p: (-scores[p], ids[p]))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]


def added_token(text: str, number: int, *, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens`: matched in the text as it is, before anything else."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, "special": special, **flags}


def _tokenizer(model: dict[str, Any], added: list[dict[str, Any]], bos: str, **steps: Any) -> dict[str, Any]:
    ids = {t["content"]: t["id"] for t in added}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    start = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    template = {
        "type": "TemplateProcessing",
        "single": [*start, text],
        "pair": [*start, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}} if bos else {},
    }
    return {"version": "1.0", "added_tokens": added, "model": model, "post_processor": template, **steps}


def _of_sentencepiece(folder: Path) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(folder / PIECES))
    except (RuntimeError, OSError) as error:
        raise InvalidModelFile(f"{folder / PIECES} is damaged: {error}", hint="Download it again.") from error
    ids, scores, added = {}, {}, {}
    for number in range(model.vocab_size()):
        piece = model.id_to_piece(number)
        ids[piece] = number
        if model.is_control(number) or model.is_unknown(number):
            added[number] = added_token(piece, number, special=True)
        elif not (model.is_byte(number) or model.is_unused(number)):
            scores[piece] = model.get_score(number)
    if any(
        score != int(score) for score in scores.values()
    ):  # BPE's scores are ranks, Unigram's log-probabilities
        raise Unsupported(
            f"{folder / PIECES} is a Unigram model",
            hint=f"Load and save it with transformers, which writes a {TOKENIZER}.",
        )
    if model.encode("a  b", out_type=str) == model.encode("a b", out_type=str):
        raise Unsupported(
            f"{folder / PIECES} drops repeated spaces",
            hint=f"Load and save it with transformers, which writes a {TOKENIZER}.",
        )
    settings = read_settings(folder)
    extra = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    added |= {int(n): added_token(text, int(n), special=False) for text, n in extra.items()}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        known = added_token(token["content"], int(number), special=bool(token.get("special")))
        added[int(number)] = known | {k: bool(token.get(k)) for k in ("lstrip", "rstrip", "normalized")}
    bos = model.id_to_piece(model.bos_id()) if model.bos_id() >= 0 else ""
    return pieces(
        scores, ids, [added[n] for n in sorted(added)],
        unknown=model.id_to_piece(model.unk_id()),
        prefix=model.encode("a", out_type=str)[0].startswith(SPACE),
        bos=bos if settings.get("add_bos_token", True) else "",
    )  # fmt: skip
