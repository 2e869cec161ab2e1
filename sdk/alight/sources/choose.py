"""Which of a repository's or folder's files make up the model.

The same rules serve every hub and local folders. They see names only, so they run before anything is
downloaded; the one file they may need to read is the index of a sharded checkpoint.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from alight.artifact import is_projector
from alight.errors import InvalidModelFile, SourceError, nearest

logger = logging.getLogger(__name__)

DEFAULT_QUANTIZATION = "Q4_K_M"
SHARD_INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_REASON = "pickled weights (.bin, .pt) can run any code when opened, so alight never loads them"
PICKLE_HINT = "Look for a repository with .safetensors or .gguf files, or convert it where you trust it."

_HOW_TO_CHOOSE = "Choose one with :FILE, :QUANTIZATION (for example :Q8_0) or a glob after the name."

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5,6})\.(?P<kind>gguf|safetensors)")
_LARGEST_SPLIT = 9999
# GGUF files that are no language model of their own: a vision projector, an importance matrix.
_AUXILIARY_GGUF = re.compile(r"mmproj[^/]*$|imatrix", re.IGNORECASE)
_PROJECTOR_KINDS = ("F16", "BF16", "Q8_0", "F32")  # of several, the first that is there


@dataclass(frozen=True, slots=True)
class Choice:
    """The files to take.

    Attributes:
        format: "gguf" or "safetensors".
        paths: their names in the listing; for a GGUF the first part comes first, and the vision projector
            last.
    """

    format: str
    paths: list[str]


def choose(
    names: Collection[str], wanted: str | None, where: str, open_index: Callable[[str], Path]
) -> Choice:
    """Choose a model's files.

    Args:
        names: every file name, "/" between folders.
        wanted: an exact GGUF file name, a glob, or a quantization such as "Q4_K_M"; None for the default.
        where: what the names belong to, for messages.
        open_index: gives the shard index as a file on disk (a hub downloads it now).

    Raises:
        SourceError: nothing, or no single model, answers; or a shard is missing.
        InvalidModelFile: the shard index is not one.
    """
    if wanted is None and is_checkpoint(names):
        return Choice("safetensors", checkpoint_files(names, where, open_index))
    paths = _default_gguf(names, where) if wanted is None else _wanted_gguf(names, wanted, where)
    return Choice("gguf", paths + _projector(names, paths))


# --- GGUF --------------------------------------------------------------------------------------------


def complete_split(name: str, names: Collection[str], where: str) -> list[str]:
    """`name`, or every part when it is one part of a split model.

    Raises:
        SourceError: a part is not among `names`.
    """
    parts = _parts(name)
    missing = [part for part in parts if part not in names]
    if missing:
        raise SourceError(
            f"{where} lacks {len(missing)} of the {len(parts)} parts of {name}: {', '.join(missing[:3])}"
            + (" …" if len(missing) > 3 else ""),
            hint="All parts of a split model are needed in the same folder.",
        )
    return parts


def _parts(name: str) -> list[str]:
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= _LARGEST_SPLIT:
        return [name]
    stem, count, kind = match["stem"], match["count"], match["kind"]
    return [f"{stem}-{number:05d}-of-{count}.{kind}" for number in range(1, int(count) + 1)]


def _gguf_models(names: Collection[str]) -> list[str]:
    """One name per GGUF model: a split model is named by its first part."""
    return sorted({_parts(name)[0] for name in names if is_gguf(name) and not _AUXILIARY_GGUF.search(name)})


def _default_gguf(names: Collection[str], where: str) -> list[str]:
    models = _gguf_models(names)
    if not models:
        raise _nothing_usable(names, where)
    if len(models) == 1:
        return complete_split(models[0], names, where)
    usual = [name for name in models if _is_quantization(name, DEFAULT_QUANTIZATION)]
    if len(usual) != 1:
        raise _ambiguous(f"{where} has {len(models)} GGUF models", models)
    logger.info("%s has %d GGUF models; taking %s", where, len(models), usual[0])
    return complete_split(usual[0], names, where)


def _wanted_gguf(names: Collection[str], wanted: str, where: str) -> list[str]:
    if wanted.lower().endswith(PICKLE_SUFFIXES):
        raise SourceError(f"{wanted} of {where} is refused: {PICKLE_REASON}", hint=PICKLE_HINT)
    if wanted.lower().endswith(".safetensors"):
        raise SourceError(
            f"{wanted} of {where} is only a part of a checkpoint",
            hint="Leave out the file name to take all of it.",
        )
    if wanted in names:
        if not is_gguf(wanted):
            raise SourceError(f"{wanted} of {where} is no GGUF file", hint="Name a .gguf file, or none.")
        return complete_split(wanted, names, where)

    models = _gguf_models(names)
    if re.search(r"[*?\[]", wanted):
        found = [name for name in models if any(_matches(part, wanted) for part in _parts(name))]
    else:
        found = [name for name in models if _is_quantization(name, wanted)]
    if len(found) == 1:
        return complete_split(found[0], names, where)
    if found:
        raise _ambiguous(f"{wanted!r} fits {len(found)} GGUF models of {where}", found)
    if not models:
        raise _nothing_usable(names, where)
    near = nearest(wanted, models)
    raise SourceError(
        f"{where} has no file or quantization {wanted!r}; it has: {_listed(models)}",
        hint=f"Did you mean :{near[0]}?" if near else _HOW_TO_CHOOSE,
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name.lower(), pattern.lower())


def _is_quantization(name: str, quantization: str) -> bool:
    """Whether a GGUF's name says it is of that quantization: `Q4_K` must not match `…-Q4_K_M.gguf`."""
    stem = name[: -len(".gguf")]
    split = _PART.fullmatch(name)
    if split is not None:
        stem = split["stem"]
    return re.search(rf"(^|[-._/]){re.escape(quantization)}($|[-./])", stem, re.IGNORECASE) is not None


def is_gguf(name: str) -> bool:
    """Whether a file name is a GGUF's."""
    return name.lower().endswith(".gguf")


def _projector(names: Collection[str], paths: list[str]) -> list[str]:
    """The vision projector that belongs to a model; nothing where there is none, or where it is the model."""
    found = sorted(name for name in names if is_projector(name))
    if not found or is_projector(paths[0]):
        return []
    usual = (name for kind in _PROJECTOR_KINDS for name in found if _is_quantization(name, kind))
    return [next(usual, found[0])]


# --- Checkpoints -------------------------------------------------------------------------------------


def is_checkpoint(names: Collection[str]) -> bool:
    """Whether the names are a Hugging Face checkpoint with safetensors weights."""
    return "config.json" in names and (SHARD_INDEX in names or any(_is_weight(name) for name in names))


def checkpoint_files(names: Collection[str], where: str, open_index: Callable[[str], Path]) -> list[str]:
    """The files a checkpoint needs: weights, configuration, tokenizer, chat template, licence, model card.

    Python files are left behind: alight runs no code from a model repository.

    Raises:
        SourceError: a shard is missing.
        InvalidModelFile: the shard index is not one.
    """
    if SHARD_INDEX in names:
        # The index tells exactly which files hold the weights; some repositories carry them twice.
        weights = shards_of_index(open_index(SHARD_INDEX))
        missing = [shard for shard in weights if shard not in names]
        if missing:
            raise SourceError(
                f"{where} lacks {len(missing)} of its {len(weights)} weight files: {', '.join(missing[:3])}"
                + (" …" if len(missing) > 3 else ""),
                hint="The copy or upload is incomplete: get the missing files.",
            )
    elif "model.safetensors" in names:
        weights = ["model.safetensors"]
    else:
        weights = sorted(name for name in names if _is_weight(name))
        for name in weights:
            complete_split(name, names, where)
    return [*sorted(name for name in names if _is_companion(name)), *weights]


def shards_of_index(index: Path) -> list[str]:
    """The weight files that a `model.safetensors.index.json` names.

    Raises:
        InvalidModelFile: it is no such index.
    """
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if shards and all(isinstance(shard, str) and _is_weight(shard) for shard in shards):
            return sorted(shards)
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    raise InvalidModelFile(
        f"{index} is no index of safetensors files in one folder",
        hint="It must hold a weight_map from tensor names to .safetensors file names. Get it again.",
    )


def _is_weight(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name


def _is_companion(name: str) -> bool:
    if "/" in name:
        return False
    if name.endswith(".json"):
        # Other .index.json files index weights that are not taken (pytorch_model.bin.index.json).
        return not name.endswith(".index.json") or name == SHARD_INDEX
    return (
        name in ("merges.txt", "vocab.txt", "README.md")
        or name.endswith((".model", ".tiktoken", ".jinja"))  # .model: sentencepiece
        or name.upper().startswith(("LICENSE", "LICENCE"))
    )


# --- Messages ----------------------------------------------------------------------------------------


def _nothing_usable(names: Collection[str], where: str) -> SourceError:
    if any(name.lower().endswith(PICKLE_SUFFIXES) for name in names):
        return SourceError(f"{where} has only pickled weights: {PICKLE_REASON}", hint=PICKLE_HINT)
    return SourceError(
        f"{where} holds no model: neither a .gguf file nor config.json with .safetensors files",
        hint=f"It holds: {_listed(sorted(names)) or 'nothing'}.",
    )


def _ambiguous(message: str, models: list[str]) -> SourceError:
    return SourceError(
        f"{message}: {_listed(models)}",
        hint=_HOW_TO_CHOOSE,
    )


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
