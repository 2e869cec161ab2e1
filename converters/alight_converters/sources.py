"""Open any source of weights as a checkpoint: a folder, a GGUF file, a LoRA adapter on top of a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from alight.errors import BadInput
from alight_converters import lora
from alight_converters.checkpoint import CONFIG, Checkpoint, write
from alight_converters.families import Foreign, foreign
from alight_converters.read_gguf import read_gguf
from alight_converters.tokenizer_files import PIECES, TOKENIZER, read_tokenizer


def open_source(path: Path, work: Path) -> Checkpoint:
    """The checkpoint at `path`. What has to be rewritten is written below `work`, and found there the next time.

    Args:
        path: a Hugging Face or ModelScope folder; a GGUF file, or a folder with nothing but one (of a split
            one, any part); a folder with a LoRA adapter whose base is a folder on this machine.

    Raises:
        BadInput: it is none of these. Unsupported: a family that alight does not know. InvalidModelFile: it is
        damaged or contradicts itself. DiskFull: no room in `work`.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist", hint="Give a checkpoint folder or a .gguf file.")
    if path.is_file():
        if not _is_gguf(path):  # by its content: in the store, a file's name is its digest
            raise BadInput(f"{path} is not a GGUF file", hint="Give a checkpoint folder or a .gguf file.")
        place = _place(work, path)
        return _kept(place) or read_gguf(path, place)
    if (path / lora.CONFIG).is_file():
        return _with_adapter(path, work)
    if not (path / CONFIG).is_file() and (files := sorted(path.glob("*.gguf"))):
        return open_source(_only(path, files), work)
    checkpoint = Checkpoint.open(path)
    if dress := foreign(checkpoint.config):
        place = _place(work, path)
        return _kept(place) or _rewrite(checkpoint, dress, place)
    checkpoint.check_shapes()  # what contradicts itself is refused here, not hours later
    return checkpoint


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def _place(work: Path, path: Path, *others: Path) -> Path:
    """Where a source is written: a name that changes with the source's files."""
    found = [file for p in (path, *others) for file in (sorted(p.iterdir()) if p.is_dir() else [p])]
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in found]
    return work / f"{path.stem}-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]}"


def _kept(place: Path) -> Checkpoint | None:
    return Checkpoint.open(place) if place.is_dir() else None


def _only(folder: Path, files: list[Path]) -> Path:
    """The one model among the GGUF files of a folder."""
    first = [f for f in files if "-of-" not in f.stem or "-00001-of-" in f.stem]
    if len(first) != 1:
        raise BadInput(
            f"{folder} holds {len(files)} GGUF files: {', '.join(f.name for f in files[:4])}",
            hint="Give the file that you want.",
        )
    return first[0]


def _with_adapter(path: Path, work: Path) -> Checkpoint:
    adapter = lora.Adapter.open(path)
    base = (path / adapter.base).resolve() if adapter.base else path
    if base == path.resolve() or not base.exists():
        raise BadInput(
            f"{path} is a LoRA adapter of {adapter.base or 'a model that it does not name'!r}, "
            "which is not a folder on this machine",
            hint=f"Fetch that model and set base_model_name_or_path in {path / lora.CONFIG} to its folder, "
            "or give that folder as the source and merge_lora as the first pass.",
        )
    place = _place(work, path, base)
    return _kept(place) or lora.merge(open_source(base, work), adapter, place)


def _rewrite(checkpoint: Checkpoint, dress: Foreign, folder: Path) -> Checkpoint:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint.tensors():
            yield from dress.tensors(name, tensor, checkpoint.config)

    files = {}
    if not (checkpoint.folder / TOKENIZER).is_file() and (checkpoint.folder / PIECES).is_file():
        # Its tokenizer is code in its folder, which transformers would want to run.
        files[TOKENIZER] = json.dumps(read_tokenizer(checkpoint.folder), ensure_ascii=False)
    return write(folder, dress.config(checkpoint.config), tensors(), like=checkpoint, files=files)
