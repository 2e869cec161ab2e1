"""Where a build keeps its files: a folder that is gone afterwards, and a cache that stays.

$ALIGHT_HOME/build/<name>/    one running build; a killed one's is removed by the next build
$ALIGHT_HOME/cache/build/     finished stages and measurements; may be deleted at any time
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from alight import paths
from alight.artifact import canonical, digest_of
from alight.blobs import disk_full_is_ours, hash_file
from alight.errors import BadInput, DiskFull

_LOCK = ".lock"


def cache() -> Path:
    """What builds remember."""
    return paths.home() / "cache" / "build"


def key_of(**parts: Any) -> str:
    """A short name for what is decided by these JSON values."""
    return digest_of(canonical(parts)).removeprefix("sha256:")[:32]


def digest_of_path(path: Path) -> str:
    """Of a file's content, or of all files of a folder. Raises BadInput where there is neither."""
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise BadInput(
            f"{path} does not exist", hint="Give a file or folder; a recipe's paths are relative to it."
        )
    files = sorted(f for f in path.rglob("*") if f.is_file())
    return key_of(files={str(f.relative_to(path)): hash_file(f) for f in files})


@contextmanager
def workspace(size: int) -> Iterator[Path]:
    """A folder on the store's disk; gone afterwards, whatever happens. What killed builds left goes now.

    Raises:
        DiskFull: fewer than `size` bytes are free, or there is no room during the block.
    """
    root = paths.home() / "build"
    with disk_full_is_ours(root):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(paths.home() / "build.lock"):  # a folder and its lock appear together
            _remove_abandoned(root)
            free = shutil.disk_usage(root).free
            if free < size:
                raise DiskFull(root, size, free)
            folder = Path(tempfile.mkdtemp(dir=root))
            lock = FileLock(folder / _LOCK)
            lock.acquire()
        try:
            yield folder
        finally:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Replace a file; it is whole at any time."""
    with disk_full_is_ours(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(data, file, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None where there is nothing that can be read."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _remove_abandoned(root: Path) -> None:
    for folder in root.iterdir():
        try:
            with FileLock(folder / _LOCK, timeout=0):
                pass
        except (Timeout, NotADirectoryError):  # a build is at work in it, or it is no folder of ours
            continue
        shutil.rmtree(folder, ignore_errors=True)
