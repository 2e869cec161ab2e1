"""Keep OpenMP's threads from spinning while another program needs the core."""

from __future__ import annotations

import os

# llama.cpp's threads meet at a barrier some thousand times per token. By default libgomp spins there 300,000
# times, and where another program holds one of the cores, the spinner keeps the thread that it waits for
# from running. SmolLM2-135M on two cores, tokens/s at 100, 1,000, 10,000 and 300,000 spins: 57, 35, 5 and 3
# among busy programs; 43, 130, 125 and 120 alone. So: long enough for a barrier, short enough to share.
_SPINS = "2000"


def calm() -> None:
    """Set it, before libgomp is loaded; what the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
