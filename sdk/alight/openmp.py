"""Keep OpenMP's threads from spinning while another program needs the core."""

from __future__ import annotations

import os

# llama.cpp's threads meet at a barrier some thousand times per token. By default libgomp spins there for
# about a millisecond, and where another program holds one of the cores, the spinner keeps the thread that
# it waits for from running: decode fell from 57 to 3 tokens/s on two busy cores. A short spin and then sleep.
_SPINS = "100"


def calm() -> None:
    """Set it, before libgomp is loaded; what the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
