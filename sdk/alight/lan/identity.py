"""Who this device is on the network: a random id, made once and kept."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets

from alight import paths

log = logging.getLogger(__name__)


def device_id() -> str:
    """The id of this device: 16 hexadecimal digits, the same after a restart and after a change of name."""
    file = paths.home() / "device-id"
    if (known := _read(file)) is not None:
        return known
    fresh = secrets.token_hex(8)
    temporary = file.with_name(f"device-id.{fresh}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(fresh)
        try:
            # A link, unlike a rename, does not replace the id that another process may just have written.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, file)
        finally:
            temporary.unlink()
    except OSError as error:
        log.warning("the device id cannot be kept, so it changes with every start: %s", error)
    return _read(file) or fresh


def _read(file: os.PathLike[str]) -> str | None:
    try:
        with open(file, encoding="ascii", errors="replace") as f:  # noqa: PTH123
            text = f.read(64).strip()
    except OSError:
        return None
    return text if re.fullmatch(r"[0-9a-f]{16}", text) else None
