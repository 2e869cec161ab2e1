"""Running out of memory: told from other failures, and answered with fewer rows at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from alight.errors import BadInput

T = TypeVar("T")
_log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU, on the CPU as torch says it, and as Python does."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def unless_out_of_memory(do: Callable[[], T]) -> T | None:
    """None where memory is out. It returns before anything is tried again: the traceback holds tensors."""
    try:
        return do()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


@contextmanager
def out_of_memory_is(what: str, hint: str) -> Iterator[None]:
    """Where memory runs out in the block, a BadInput says what needed it and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BadInput(f"{what} runs out of memory", hint=hint) from error


def release() -> None:
    """Give back to the GPU what torch keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class RowsAtOnce:
    """How many rows go through a model together: half as many from now on, whenever they do not fit.

    Args:
        rows: at first.
        what: is done with them, for the error.
        hint: what helps where not even one row fits.
    """

    def __init__(self, rows: int, what: str, hint: str) -> None:
        self.rows = rows
        self._what = what
        self._hint = hint

    def run(self, do: Callable[[int], T]) -> T:
        """What `do(rows)` returns, which is not None; repeated with fewer rows at once until they fit.

        Raises:
            BadInput: one row does not fit.
        """
        while True:
            rows = self.rows
            done = unless_out_of_memory(partial(do, rows))
            if done is not None:
                return done
            if rows == 1:
                raise BadInput(f"{self._what} runs out of memory with one row at a time", hint=self._hint)
            self.rows = rows // 2
            release()
            _log.warning("%s: %d rows at once run out of memory, trying %d", self._what, rows, self.rows)
