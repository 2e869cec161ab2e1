"""Where alight keeps its files."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$ALIGHT_HOME`, or `~/.alight`: models, downloads and history live under it."""
    override = os.environ.get("ALIGHT_HOME")
    return Path(override).expanduser() if override else Path.home() / ".alight"
