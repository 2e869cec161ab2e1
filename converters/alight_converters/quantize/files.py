"""A file that appears under its name only when it is complete."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alight.errors import DiskFull


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`; it gets that name when the block ends well, and is gone otherwise.

    Raises:
        DiskFull: no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as opened:
            os.fsync(opened.fileno())
        part.chmod(0o644)
        part.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(path.parent) from error
        raise
    finally:
        part.unlink(missing_ok=True)
