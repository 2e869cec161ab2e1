"""Notices that a worker process hangs: it has something to do, and nothing happens.

A worker with work tells every second (`BEAT`) how far its engine is. What counts as hung: no such word
for too long (the process is stopped, or stuck in native code), or word that the engine stands still.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 600.0  # seconds; a step of a large model on a small board takes minutes


class Watchdog:
    """Watches one worker. Thread-safe.

    Args:
        patience: seconds without progress after which it hangs, several BEATs; math.inf never looks.
        on_hang: called once, from a thread of the watchdog's.
    """

    def __init__(self, patience: float, on_hang: Callable[[], None]) -> None:
        self._patience = patience
        self._on_hang = on_hang
        self._changed = threading.Condition()
        self._requests = 0
        self._progress: object = None
        self._since = 0.0  # monotonic: when there was progress, or nothing to do
        self._stopped = patience == math.inf
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """A request is sent."""
        with self._changed:
            self._requests += 1
            if self._requests == 1:
                self._since = time.monotonic()
                self._changed.notify()
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._watch, name="alight-watchdog", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """A request has ended."""
        with self._changed:
            self._requests -= 1
            self._since = time.monotonic()

    def beat(self, progress: object, busy: bool) -> None:
        """The worker tells how far it is; `busy`: its engine has something to do."""
        with self._changed:
            if progress != self._progress or not busy:
                self._progress, self._since = progress, time.monotonic()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._stopped:
                left = self._since + self._patience - time.monotonic() if self._requests else None
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            else:
                return
        self._on_hang()
