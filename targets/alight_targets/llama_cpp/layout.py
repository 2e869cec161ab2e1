"""How the cells of the KV cache are laid out, and which layout suits what runs.

Unified: all sequences share all cells. A common beginning is held once and a request may use every cell, but
attention of each token walks over the cells of all others, too. Streams: each sequence has an equal part to
itself, and attention sees nothing else. On a processor that is worth a lot (docs/engine.md has the figures),
so the engine uses streams wherever what runs fits into them, and changes the layout when it no longer does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PAGE = 256  # cells; llama.cpp rounds the part of a sequence up to it
UNIFIED = 1


@dataclass(frozen=True, slots=True)
class Layouts:
    """The layouts that a model may use, each known by its number of streams; 1 is the unified cache.

    Attributes:
        cells: of the KV cache.
        sequences: that there can be at most.
        fixed: only the unified layout.
    """

    cells: int
    sequences: int
    fixed: bool = False

    def best(self, wants: Sequence[int]) -> int:
        """For requests that will need `wants` cells each: as many streams as are large enough."""
        streams = UNIFIED
        while not self.fixed and self._fit(2 * streams, wants):
            streams *= 2
        return streams if streams >= len(wants) else UNIFIED

    def suits(self, streams: int, wants: Sequence[int]) -> bool:
        """Can they all run in it?"""
        return streams == UNIFIED or (streams >= len(wants) and self._fit(streams, wants))

    def _fit(self, streams: int, wants: Sequence[int]) -> bool:
        whole_pages = self.cells % (streams * PAGE) == 0
        return streams <= self.sequences and whole_pages and self.cells // streams >= max(wants, default=1)
