"""The documents of a calibration text: of a file, of a folder, or of a data set on the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from alight.errors import BadInput, MissingExtra, SourceError, Unsupported
from alight.sources import huggingface

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "hf://datasets/"
FORMATS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet", ".arrow")
# What `datasets` writes beside the rows.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_OTHER_SPLIT = re.compile(r"(?:^|[/_.-])(?:test|validation|valid|val|dev|eval)(?:[/_.-]|$)", re.I)
_SUPPORTED = f"Supported are {', '.join(FORMATS)}."
_AT_ONCE = 256  # rows of a parquet file in memory
_ROW = 'A row is {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}.'


@cache
def local(text: Path | str) -> Path:
    """Where a calibration text is on this machine: a data set of the hub is downloaded, once.

    Args:
        text: a path, or `hf://datasets/organisation/name[@revision][:file]`. The file may be a pattern,
            `data/train-*`; without it, all files of text are taken, but not those of test and validation.

    Raises:
        BadInput: the address is wrong. SourceError, NetworkError, DiskFull: as `alight.sources.fetch`.
    """
    if isinstance(text, Path):
        return text
    return huggingface.fetch_dataset(text, _wanted, _silent)


def _silent(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


def documents(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The documents of a file or folder, as text with its special tokens spelled out.

    Of a folder with a training split, the other splits' files are left out.

    Raises:
        BadInput: no such file, or a row that has neither text nor messages. Unsupported: another format.
        MissingExtra: parquet and arrow files need pyarrow.
    """
    if path.is_dir():
        inside = {f.relative_to(path).as_posix(): f for f in path.rglob("*") if f.is_file()}
        names = _texts(inside)
        if not names:
            raise BadInput(f"{path} has no {', '.join(FORMATS)} files", hint=_SUPPORTED)
        for name in names:
            yield from documents(inside[name], tokenizer)
        return
    if not path.is_file():
        raise BadInput(f"no calibration file {path}", hint="Give a file or folder of text.")
    if path.suffix not in FORMATS:
        raise Unsupported(f"{path.name}: calibration from {path.suffix or 'such'} files", hint=_SUPPORTED)
    end = tokenizer.eos_token or ""
    try:
        if path.suffix in (".txt", ".md"):
            yield path.read_text(encoding="utf-8") + end
            return
        for number, row in _rows(path):
            yield _document(row, tokenizer, f"{path} {number}", end)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8: {error}", hint="Convert it with iconv.") from error


def _wanted(names: Collection[str], file: str | None) -> list[str]:
    """The files of a hub's data set to bring."""
    if file is None:
        found = _texts(names)
        if not found:
            raise SourceError(f"the data set has no {', '.join(FORMATS)} files", hint="Give a local folder.")
        return found
    found = sorted(name for name in names if name == file or fnmatch(name, file))
    if not found:
        raise SourceError(
            f"the data set has no file {file!r}", hint=f"It has {', '.join(sorted(names)[:20])}."
        )
    return found


def _texts(names: Iterable[str]) -> list[str]:
    """Those that hold rows; where some are of a training split, those of the others are not among them."""
    found = sorted(n for n in names if n.endswith(FORMATS) and PurePosixPath(n).name not in _ABOUT)
    rows = [n for n in found if PurePosixPath(n).name.upper() != "README.MD"] or found
    splits = any("train" in n for n in rows)
    return [n for n in rows if not (splits and _OTHER_SPLIT.search(n))]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a table, and where it is, for errors."""
    if path.suffix == ".csv":
        return _csv(path)
    if path.suffix in (".parquet", ".arrow"):
        return _columns(path)
    return _json(path)


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8", newline="") as opened:
        reader = csv.DictReader(opened)
        if "text" not in (reader.fieldnames or ()):
            raise BadInput(f"{path} has no column 'text', only {', '.join(reader.fieldnames or ())}")
        for number, row in enumerate(reader, 2):
            yield f"line {number}", {"text": row["text"] or ""}


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """One array of rows, or a row in each line: `datasets` gives both the name .json."""
    with path.open(encoding="utf-8") as opened:
        start = opened.read(64).lstrip()
        opened.seek(0)
        if path.suffix == ".json" and start.startswith("["):
            for number, row in enumerate(_parsed(opened.read(), str(path)), 1):
                yield f"row {number}", row
            return
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield f"line {number}", _parsed(line, f"{path} line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput(f"{where} is not JSON: {error}") from error


def _columns(path: Path) -> Iterator[tuple[str, Any]]:
    """Of parquet, or of what `Dataset.save_to_disk` writes; a few rows at a time are in memory."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra(f"reading {path.name}", "parquet") from None
    try:
        if path.suffix == ".parquet":
            file = parquet.ParquetFile(path)
            names, batches = file.schema_arrow.names, file.iter_batches(batch_size=_AT_ONCE)
        else:
            stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            names, batches = stream.schema.names, iter(stream)
        column = next((name for name in ("messages", "text") if name in names), None)
        if column is None:
            raise BadInput(f"{path} has no column 'text' or 'messages', only {', '.join(names)}")
        number = 0
        for batch in batches:
            for value in batch.column(column).to_pylist():
                number += 1
                yield f"row {number}", {column: value}
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"{path} is no {path.suffix} file: {error}", hint="Fetch it again.") from error


def _document(row: Any, tokenizer: PreTrainedTokenizerBase, where: str, end: str) -> str:
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return _chat(row["messages"], tokenizer, where)
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"]) + end
    raise BadInput(f"{where} has neither a 'text' nor 'messages'", hint=_ROW)


def _chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if not tokenizer.chat_template:
        raise BadInput(
            f"{where} is a chat, and the checkpoint's tokenizer has no chat template",
            hint='Give lines of {"text": …}, or a checkpoint that is made for chat.',
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program: it may fail in any way
        raise BadInput(f"{where}: the chat template refuses it: {error}") from error
