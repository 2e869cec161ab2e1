"""A request's turn at a model, and a model's place in the server with those who wait for it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType

from alight.artifact import Artifact
from alight.errors import Busy
from alight.server.restarts import Crashes
from alight.store import short_name
from alight.target import Model, Usage

_WEIGHT = 0.2  # of the newest value in a moving average


class State(Enum):
    OUT = "not loaded"
    LOADING = "loading"
    IN = "loaded"
    CLOSING = "unloading"


@dataclass(slots=True, eq=False)
class Slot:
    """A model's place. The manager's lock guards all of it."""

    name: str  # the full one
    keep_alive: float  # seconds that it stays after its last request
    crashes: Crashes
    state: State = State.OUT
    artifact: Artifact | None = None
    model: Model | None = None
    own_artifact: bool = False  # came by `offer`, and is in no store
    handed_over: bool = False  # came loaded, by `add`: once closed, nothing here could bring it back
    unwanted: bool = False  # to be unloaded when its last user leaves
    queue: deque[Turn] = field(default_factory=deque)
    users: int = 0
    context: int = 0  # tokens it was loaded for: what it holds, or more that was wished for and did not fit
    needed: int = 0  # bytes that it was predicted to take
    mapped: int = 0  # those of them that are mapped files
    loaded_at: float = 0.0  # seconds since the epoch
    used: float = 0.0  # monotonic: when its last user left
    speed: float = 0.0  # tokens per second of one answer, of late
    seconds: float = 0.0  # that a turn takes, of late

    @property
    def idle(self) -> bool:
        """Whether it may be unloaded. Requests may wait even then, while another model waits for its memory."""
        return self.state is State.IN and not self.users and not self.handed_over

    @property
    def outgrown(self) -> bool:
        """Whether who is next wants a larger context than it was loaded for. It is then loaded anew, once
        nobody uses it."""
        if self.state is not State.IN or self.handed_over or not self.queue or not self.model:
            return False
        trained = self.model.info.trained_context
        wanted = self.queue[0].context or 0
        return (min(wanted, trained) if trained else wanted) > self.context

    @property
    def expires(self) -> float | None:
        """When it is to be unloaded (monotonic); None while it is in use, or if it stays."""
        return self.used + self.keep_alive if self.idle and self.keep_alive < math.inf else None

    @property
    def expires_at(self) -> float | None:
        """Like `expires`, in seconds since the epoch; for one in use, as if it were not from now on."""
        if self.state is not State.IN or self.handed_over or self.keep_alive == math.inf:
            return None
        left = self.keep_alive if self.expires is None else self.expires - time.monotonic()
        return time.time() + left

    def busy(self, slots: int) -> Busy:
        waiting = len(self.queue)
        wait = min(max(math.ceil(self.seconds * (waiting + 1) / slots), 1), 120)
        return Busy(
            f"model {short_name(self.name)!r} is busy: {self.users} requests run and {waiting} wait",
            retry_after=wait,
        )

    def note(self, usage: Usage) -> None:
        if usage.tokens_per_second:
            self.speed = _average(self.speed, usage.tokens_per_second)


class Turn:
    """A request's turn at a model. In a `with` block it waits for it, gives the model, and keeps it loaded
    until the block ends.

    Args:
        name: of the model.
        keep_alive: seconds that it then stays loaded; None leaves that as it is.
        context: tokens that it is to hold; None leaves that as it is.
        enter, leave, give_up: what the manager does with it.
    """

    def __init__(
        self,
        name: str,
        keep_alive: float | None,
        context: int | None,
        enter: Callable[[Turn], None],
        leave: Callable[[Turn], None],
        give_up: Callable[[Turn], None],
    ) -> None:
        self.name = name
        self.keep_alive = keep_alive
        self.context = context
        self.slot: Slot | None = None  # once it has a place in the queue
        self._enter, self._leave, self._give_up = enter, leave, give_up
        self._model: Future[Model] = Future()
        self._admitted = 0.0

    @property
    def model_name(self) -> str:
        """The name as the server lists it, which one request may write in several ways."""
        return short_name(self.slot.name) if self.slot else self.name

    def admit(self, model: Model) -> bool:
        """It is its turn; False if nobody waits for that any more."""
        self._admitted = time.monotonic()
        if not self._model.set_running_or_notify_cancel():
            return False
        self._model.set_result(model)
        return True

    def fail(self, error: Exception) -> None:
        if self._model.set_running_or_notify_cancel():
            self._model.set_exception(error)

    def cancel(self) -> bool:
        """Stop waiting; False if it is its turn already. The block is then not run: CancelledError."""
        cancelled = self._model.cancel()
        if cancelled and self.slot:
            self._give_up(self)
        return cancelled

    def note(self, usage: Usage) -> None:
        """What an answer took."""
        if self.slot:
            self.slot.note(usage)

    def __enter__(self) -> Model:
        self._enter(self)
        if self._model.cancelled():  # before it had its place
            self._give_up(self)
        try:
            return self._model.result()
        except BaseException:  # also Ctrl-C while it waits
            if not self.cancel() and self._admitted:
                self._leave(self)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.slot:
            self.slot.seconds = _average(self.slot.seconds, time.monotonic() - self._admitted)
        self._leave(self)


def _average(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old) if old else new
