"""What else runs on the engine's thread, between two steps of the requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Jobs:
    """Short ones, which run at once, and long ones, of which a step runs at a time (to the next `yield`)."""

    def __init__(self) -> None:
        self._short: deque[Callable[[], None]] = deque()
        self._long: deque[tuple[Generator[None, None, Any], Future[Any]]] = deque()

    def __len__(self) -> int:
        return len(self._short) + len(self._long)

    def add(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self._short.append(run)
        return future

    def add_steps(self, steps: Generator[None, None, T]) -> Future[T]:
        future: Future[T] = Future()
        self._long.append((steps, future))
        return future

    def run(self) -> None:
        """All short ones, and a step of a long one; then it is the turn of the others of its kind."""
        while self._short:
            self._short.popleft()()
        if not self._long:
            return
        steps, future = self._long.popleft()
        try:
            next(steps)
        except StopIteration as end:
            future.set_result(end.value)
        except BaseException as error:
            future.set_exception(error)
        else:
            self._long.append((steps, future))

    def end(self, error: Exception) -> None:
        """Run the short ones, and give the long ones up."""
        while self._short:
            self._short.popleft()()
        for steps, future in self._long:
            steps.close()
            future.set_exception(error)
