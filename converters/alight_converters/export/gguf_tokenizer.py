"""The vocabulary of a GGUF, from a checkpoint's tokenizer.

llama.cpp writes tokenizers of its own kinds. Each is used only where it gives the same tokens as the
checkpoint's tokenizer does, and anything else is refused: a model that reads other tokens than it was
trained on is silently worse.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from alight.errors import InvalidModelFile, Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.export import pre_tokenizers
from alight_converters.tokenizer_files import (
    SPACE,
    merges_of,
    read_json,
    read_settings,
    read_template,
    read_tokenizer,
    token_text,
)

log = logging.getLogger(__name__)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORST = -1e6  # score of a piece that no merge makes
# llama.cpp drops spaces after a special token in models whose name has "phi-3", except after these.
_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_NOT_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}
_STRIPPED = "</s>"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The metadata of a tokenizer, under its full GGUF keys, and the name that the model has to go by."""

    metadata: dict[str, Any]
    model_name: str


def vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """What llama.cpp needs to tokenize as the checkpoint does, and its chat template.

    Raises:
        Unsupported: llama.cpp has no tokenizer that gives the same tokens. InvalidModelFile: tokenizer and
        config contradict each other.
    """
    tokenizer, settings = read_tokenizer(checkpoint.folder), read_settings(checkpoint.folder)
    model = tokenizer["model"]
    added = _added_tokens(tokenizer, checkpoint)
    ids = _ids(model) | {token["content"]: token["id"] for token in added}
    kind = model.get("type") or ("BPE" if "merges" in model else "")
    if kind == "BPE" and model.get("byte_fallback"):
        found = _pieces(tokenizer, model)
    elif kind == "BPE":
        found = _byte_level(tokenizer, model)
    elif kind == "Unigram":
        found = _unigram(tokenizer, model, ids)
    else:
        raise Unsupported(
            f"the tokenizer is of type {kind!r}", hint="alight knows BPE, SentencePiece BPE and Unigram."
        )
    size = int(checkpoint.full_config["vocab_size"])
    scores = found.pop("scores", None)
    found |= _tokens(ids, added, model, size)
    if scores is not None:
        by_id = {number: scores.get(token, _WORST) for token, number in ids.items()}
        found["scores"] = [float(by_id.get(n, _WORST)) for n in range(size)]
    found |= _special(tokenizer, settings, checkpoint, ids)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    if template := read_template(checkpoint.folder):
        metadata["tokenizer.chat_template"] = template
    return Vocabulary(metadata, _name(checkpoint, added))


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    if model.get("type") == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _added_tokens(tokenizer: Mapping[str, Any], checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Added tokens that have an embedding; Gemma 3, for one, has a token for images that has none."""
    size = int(checkpoint.full_config["vocab_size"])
    added = tokenizer.get("added_tokens") or []
    if outside := [t["content"] for t in added if t["id"] >= size]:
        log.info("left out, since the embedding has %d rows: %s", size, ", ".join(outside))
    return [t for t in added if t["id"] < size]


def _byte_level(tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-2's kind: words by a pre-tokenizer, bytes as printable characters, ranked merges."""
    normalizer = tokenizer.get("normalizer")
    if normalizer and normalizer["type"] == "NFC":
        log.info("llama.cpp does not normalize text to NFC; text that is typed usually is already")
    elif normalizer:
        raise _no_counterpart("normalizer", normalizer)
    candidates = pre_tokenizers.find(tokenizer)
    wanted = bool(model.get("ignore_merges"))
    same = [pre for pre in candidates if pre.ignore_merges == wanted]
    if not same and not _merges_reach_all(tokenizer, model):
        raise Unsupported(
            f"the tokenizer has ignore_merges={wanted}, llama.cpp's {candidates[0].name!r} has not",
            hint="Use another export, for instance ONNX.",
        )
    return {
        "model": "gpt2",
        "pre": (same or candidates)[0].name,
        "merges": [" ".join(m) for m in _merges(model)],
    }


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    """Pairs, the first to merge first. Older files write them as one string."""
    return [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]


def _merges_reach_all(tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether merging makes every word of the vocabulary, so that it does not matter if it is skipped."""
    from tokenizers import models

    bpe = models.BPE(vocab=dict(model["vocab"]), merges=[(left, right) for left, right in _merges(model)])
    words = set(model["vocab"]) - {token["content"] for token in tokenizer.get("added_tokens") or ()}
    return all(len(bpe.tokenize(word)) == 1 for word in words)


def _pieces(tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """SentencePiece BPE: llama.cpp merges whatever makes a piece, best score first; here by the ranks of merges."""
    merges = _merges(model)
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    if {tuple(m) for m in merges} != {tuple(m) for m in merges_of(scores, model["vocab"])}:
        raise Unsupported(
            "the tokenizer's merges are not SentencePiece's: some pairs that make a piece are not merged",
            hint="Use another export, for instance ONNX.",
        )
    _check_whole(tokenizer, model["vocab"])
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": _prefix(tokenizer)}


def _unigram(
    tokenizer: Mapping[str, Any], model: Mapping[str, Any], ids: Mapping[str, int]
) -> dict[str, Any]:
    """SentencePiece Unigram, which llama.cpp knows from T5."""
    if model.get("byte_fallback"):
        raise Unsupported("a Unigram tokenizer with byte fallback", hint="llama.cpp has none for Unigram.")
    _check_whole(tokenizer, ids)
    found = {
        "model": "t5",
        "pre": "default",
        "scores": dict(model["vocab"]),
        "add_space_prefix": _prefix(tokenizer),
        "remove_extra_whitespaces": False,
    }
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Precompiled":
            found["precompiled_charsmap"] = list(base64.b64decode(step["precompiled_charsmap"]))
    return found


def _steps(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if not step:
        return []
    return [s for one in step[inner] for s in _steps(one, inner)] if step["type"] == "Sequence" else [step]


def _check_whole(tokenizer: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
    """SentencePiece tokenizers must see text whole, with spaces marked; words must not matter."""
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        spaces = step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE
        if not spaces and step["type"] not in ("Prepend", "Precompiled"):
            raise _no_counterpart("normalizer", step)
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split" and step["pattern"] == {"String": " "}:
            continue  # Gemma's: the normalizer has left no spaces
        if step["type"] != "Metaspace":
            raise _no_counterpart("pre_tokenizer", step)
        if step.get("split", True) and any(SPACE in piece[1:] for piece in vocabulary):
            raise _no_counterpart("pre_tokenizer", step)


def _prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether text begins with a space that nobody wrote.

    llama.cpp puts one at the start and after every special token. Tokenizers of the scheme "first" put one
    only at the start, where a chat has a special token: for them, none is what keeps chats exact.
    """
    if any(s["type"] == "Prepend" for s in _steps(tokenizer.get("normalizer"), "normalizers")):
        return True
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(s["type"] == "Metaspace" and s.get("prepend_scheme", "always") == "always" for s in steps)


def _no_counterpart(what: str, step: Mapping[str, Any]) -> Unsupported:
    return Unsupported(
        f"the tokenizer's {what} {dict(step)} has no counterpart in llama.cpp",
        hint="Use another export, for instance ONNX.",
    )


def _tokens(
    ids: Mapping[str, int], added: list[dict[str, Any]], model: Mapping[str, Any], size: int
) -> dict[str, Any]:
    """Token texts and types by id. Rows of the embedding that no token uses get a name that never occurs."""
    texts = [f"[PAD{n}]" for n in range(size)]
    types = [TokenType.UNUSED] * size
    fallback = bool(model.get("byte_fallback"))
    for text, number in ids.items():
        if number >= size:
            raise InvalidModelFile(f"the tokenizer's token {text!r} is {number}, the vocabulary has {size}")
        texts[number] = text
        types[number] = TokenType.BYTE if fallback and _BYTE.fullmatch(text) else TokenType.NORMAL
    for token in added:
        number = token["id"]
        types[number] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if token.get("normalized") and (fallback or model.get("type") == "Unigram"):
            texts[number] = token["content"].replace(SPACE, " ")  # llama.cpp looks before it marks spaces
    unknown = _unknown(model)
    if unknown in ids:
        types[ids[unknown]] = TokenType.UNKNOWN
    return {"tokens": texts, "token_type": [int(t) for t in types]}


def _unknown(model: Mapping[str, Any]) -> str:
    if model.get("type") == "Unigram":
        return "" if model.get("unk_id") is None else str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token") or ""


def _special(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], checkpoint: Checkpoint, ids: Mapping[str, int]
) -> dict[str, Any]:
    """Which tokens begin and end a text, and whether they are put there by themselves."""
    config, found = checkpoint.full_config, {}
    generation = checkpoint.folder / "generation_config.json"
    both = (config, read_json(generation) if generation.is_file() else {})
    texts = {key: token_text(settings.get(f"{key}_token")) for key in ("bos", "eos", "unk", "pad")}
    texts["unk"] = _unknown(tokenizer["model"]) or texts["unk"]
    for key, theirs in (("bos", "bos"), ("unk", "unknown"), ("pad", "padding")):
        number = ids.get(texts[key], config.get(f"{key}_token_id"))
        if isinstance(number, int) and 0 <= number < config["vocab_size"]:
            found[f"{theirs}_token_id"] = number
    ends = [ids[texts["eos"]]] if texts["eos"] in ids else []
    for where in both:
        more = where.get("eos_token_id")
        ends += more if isinstance(more, list) else [more] if isinstance(more, int) else []
    # llama.cpp stops at any of these three: end of text, of turn, of message.
    found |= dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), dict.fromkeys(ends), strict=False))
    first, last = _template_ends(tokenizer)
    for key, token in (("bos", first), ("eos", last)):
        adds = settings.get(f"add_{key}_token")
        adds = bool(token) if adds is None else bool(adds)
        if token in ids:
            found[f"{key}_token_id"] = ids[token]
        found[f"add_{key}_token"] = adds and f"{key}_token_id" in found
    return found


def _template_ends(tokenizer: Mapping[str, Any]) -> tuple[str, str]:
    """The tokens that the post-processor puts before and after a text; empty where it puts none."""
    for step in _steps(tokenizer.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            first, last = (step["single"][n].get("SpecialToken", {}).get("id", "") for n in (0, -1))
            return first, last
    return "", ""


def _name(checkpoint: Checkpoint, added: list[dict[str, Any]]) -> str:
    """The model's name, which decides in llama.cpp whether special tokens swallow the spaces after them."""
    name = Path(str(checkpoint.config.get("_name_or_path") or "")).name or checkpoint.folder.name
    stripped = {t["content"] for t in added if t.get("rstrip")}
    if _STRIPPED in stripped and {t["content"] for t in added} - stripped == _NOT_STRIPPED:
        return name if _PHI3.search(name) else f"Phi-3 {name}"
    if stripped:
        log.warning("llama.cpp does not drop the spaces after %s", ", ".join(sorted(stripped)[:5]))
    return _PHI3.sub("Phi 3", name)
