"""A folder that appears under its name when it is complete, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alight.errors import BadInput, DiskFull


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to write into; at the end it is synced to disk and renamed.

    Raises:
        BadInput: `folder` exists. DiskFull: no room.
    """
    if folder.exists():
        raise BadInput(f"{folder} exists already", hint="Give a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        part.chmod(0o755)
        part.rename(folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(folder, 0, shutil.disk_usage(folder.parent).free) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
