"""Models that are already on this disk: a GGUF file, a split GGUF, a checkpoint folder, an ONNX or MLC folder."""

from __future__ import annotations

import re
from pathlib import Path

from alight.artifact import files_below
from alight.errors import SourceError
from alight.exported import format_of
from alight.sources import choose
from alight.sources.fetched import Fetched, short_name


def fetch(source: str) -> Fetched:
    """Find the files of a path. Nothing is copied.

    Raises:
        SourceError: there is nothing there, it is no model, a part is missing, or the weights are pickled.
        InvalidModelFile: a checkpoint's shard index is broken.
    """
    path = _as_path(source)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise SourceError(
            f"there is no file or folder {path}",
            hint="Check the path; a model on a hub is written hf://org/name or modelscope://org/name.",
        )
    if choose.is_gguf(path.name):
        return _gguf(path)
    if path.name.lower().endswith(choose.PICKLE_SUFFIXES):
        raise SourceError(f"{path} is refused: {choose.PICKLE_REASON}", hint=choose.PICKLE_HINT)
    raise SourceError(
        f"{path} is no model", hint="Give a .gguf file, or a folder with a checkpoint, ONNX or MLC model."
    )


def exists(text: str) -> bool:
    """Whether `text` is a path that exists."""
    try:
        return bool(text) and _as_path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False


def _as_path(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:  # ~name of a user who does not exist
        return Path(text).absolute()


def _gguf(path: Path) -> Fetched:
    names = choose.complete_split(path.name, _file_names(path.parent), str(path.parent))
    return _fetched(path.parent, names, "gguf", path.parent / names[0])


def _folder(folder: Path) -> Fetched:
    names = _file_names(folder)
    if exported := format_of(names):
        return _fetched(folder, list(files_below(folder)), exported, folder)
    choice = choose.choose(names, None, str(folder), open_index=lambda name: folder / name)
    source = folder / choice.paths[0] if choice.format == "gguf" else folder
    return _fetched(folder, choice.paths, choice.format, source)


def _fetched(folder: Path, names: list[str], model_format: str, source: Path) -> Fetched:
    title = source.name
    if model_format == "gguf":
        title = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", title, flags=re.IGNORECASE)
    return Fetched(
        files={name: folder / name for name in names},
        format=model_format,
        source=str(source),
        name=short_name(title),
        licence=_licence(folder / "README.md") if model_format == "safetensors" else None,
        temporary=False,
        digests={},
    )


def _file_names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir() if entry.is_file()}
    except OSError as error:
        raise SourceError(f"cannot read the folder {folder}: {error.strerror}") from error


def _licence(model_card: Path) -> str | None:
    """The `license:` line in the front matter (the block between two `---` lines) of a model card."""
    try:
        text = model_card.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    front_matter = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = (
        re.search(r"^license:\s*['\"]?([\w.+-]+)", front_matter[1], re.MULTILINE) if front_matter else None
    )
    return found[1] if found else None
