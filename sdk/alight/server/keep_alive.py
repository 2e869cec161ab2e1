"""How long a model stays loaded after its last request, as Ollama's clients say it."""

from __future__ import annotations

import math
import re

from alight.errors import BadInput

DEFAULT = 300.0  # seconds: for models that a request loaded
FOREVER = math.inf
_CENTURY = 3.2e9

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")
_WHOLE = re.compile(rf"[-+]?({_PART.pattern})+")


def parse(value: float | str | None) -> float | None:
    """Seconds to keep a model: `FOREVER` for any negative value, 0 to unload it at once.

    Args:
        value: seconds (as a number or a text), or a Go duration such as "5m" or "1h30m"; None (or an empty
            text) leaves it to the server, and gives None.

    Raises:
        BadInput: it is none of these.
    """
    if value is None or value == "":
        return None
    seconds = _seconds(value)
    if seconds is None or math.isnan(seconds):
        raise BadInput(
            f"keep_alive is {value!r}", hint="Use seconds, a text like 5m, 0 (unload now) or -1 (keep it)."
        )
    return FOREVER if seconds < 0 or seconds > _CENTURY else seconds


def _seconds(value: float | str) -> float | None:
    try:
        return float(value)
    except ValueError:
        text = str(value)
    if not _WHOLE.fullmatch(text):
        return None
    total = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    return -total if text.startswith("-") else total
