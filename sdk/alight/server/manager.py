"""The models a server offers: loaded into worker processes when they are asked for, and let go again.

Each model has a queue: its requests take turns in the order they came, as many at once as it has slots.
One lock guards all of this; nothing slow (loading, closing) happens while it is held.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from alight.artifact import Artifact
from alight.errors import AlightError, DoesNotFit, EngineCrashed, EngineError
from alight.server import memory
from alight.server.catalog import Catalog
from alight.server.keep_alive import DEFAULT
from alight.server.offers import Loaded, Offer
from alight.server.restarts import RestartingModel
from alight.server.turns import Slot, State, Turn
from alight.server.watchdog import PATIENCE
from alight.server.worker_model import WorkerModel
from alight.store import Store
from alight.target import LoadOptions, Model

log = logging.getLogger(__name__)

MAX_WAITING = 64  # requests of one model that wait for a slot; one more is Busy


class Models(Catalog):
    """Which models a server offers. Thread-safe.

    Args:
        store: where they come from; None offers only those given to `offer` and `add`.
        options: how each is loaded.
        target: the runtime; "auto" takes the first that is here and reads the model's format.
        keep_alive: seconds that a model stays loaded after its last request, unless that says otherwise;
            `keep_alive.FOREVER` keeps it until its memory is needed.
        max_memory: bytes that all models may take together; None leaves that to the machine.
        max_waiting: requests of one model that may wait for a slot; one more is Busy.
        hang_after: seconds without progress after which a model's process counts as hung, and is started anew.
    """

    def __init__(
        self,
        store: Store | None = None,
        options: LoadOptions | None = None,
        *,
        target: str = "auto",
        keep_alive: float = DEFAULT,
        max_memory: int | None = None,
        max_waiting: int = MAX_WAITING,
        hang_after: float = PATIENCE,
    ) -> None:
        self._options = options or LoadOptions()
        super().__init__(store, keep_alive, self._options.slots)
        self._target = target
        self._max_memory = max_memory
        self._max_waiting = max_waiting
        self._hang_after = hang_after
        self._one_load = threading.Lock()  # loads one model at a time: two would count the same free memory
        self._wanting_room: Slot | None = None  # what is to be loaded as soon as others end
        self._unloader: threading.Thread | None = None
        self._closed = False

    # -- using them ------------------------------------------------------------------------------

    def use(self, name: str, *, keep_alive: float | None = None, context: int | None = None) -> Turn:
        """A turn at a model: `with models.use("smollm2") as model: …`. It waits for a slot (and for the
        model to be loaded), and keeps it loaded until the block ends.

        Args:
            keep_alive: seconds that the model then stays loaded, also after later requests that do not say;
                None leaves that as it is.
            context: tokens that the model is to hold. If it was loaded for fewer, it is loaded anew as soon as
                nobody uses it, with as many of them as it was trained for and as fit.

        Raises:
            When the block begins: ModelNotFound, Busy, and what loading raises: DoesNotFit,
            TargetUnavailable, EngineError, ….
        """
        return Turn(name, keep_alive, context, self._enter, self._leave, self._give_up)

    def get(self, name: str, *, keep_alive: float | None = None) -> Model:
        """The model, loaded now if it was not. It may be unloaded later: `use` prevents that."""
        with self.use(name, keep_alive=keep_alive) as model:
            return model

    def unload(self, name: str) -> bool:
        """Free a model's memory. It loads again when asked for.

        Returns:
            True once it is unloaded; False if it will be when its last request ends.

        Raises:
            ModelNotFound.
        """
        full = self._full_name(name)
        with self._changed:
            slot = self._slots.get(full)
        if slot is None:
            self._stored(full)  # raises if there is no such model
            return True
        with self._changed:
            slot.unwanted = slot.state in (State.IN, State.LOADING)
            going = self._settle(slot)
        if going:
            self._close(slot, going)
        with self._changed:
            self._changed.wait_for(lambda: slot.state is not State.CLOSING)
            return slot.state is State.OUT

    def close(self) -> None:
        """Close all models; a later `use` is an EngineError. Safe to call twice."""
        with self._changed:
            self._closed = True
            slots = [*self._slots.values()]
            waiting = [turn for slot in slots for turn in slot.queue]
            for slot in slots:
                slot.queue.clear()
            self._changed.notify_all()
        for turn in waiting:
            turn.fail(_closed())
        for slot in slots:
            if model := slot.model:
                model.close()
        if self._unloader:
            self._unloader.join()
        with self._one_load, self._changed:  # what was loading has noticed by now
            for slot in slots:
                slot.model, slot.state = None, State.OUT

    def __enter__(self) -> Models:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- turns -----------------------------------------------------------------------------------

    def _enter(self, turn: Turn) -> None:
        slot = self._slot(self._full_name(turn.name))
        with self._changed:
            if self._closed:
                raise _closed()
            if slot.users + len(slot.queue) >= self._slots_each + self._max_waiting:
                raise slot.busy(self._slots_each)
            turn.slot = slot
            slot.queue.append(turn)
            slot.unwanted = False
            self._advance(slot)
            going = self._take_out(slot) if slot.idle and slot.outgrown else None
        if going:
            self._close(slot, going)

    def _leave(self, turn: Turn) -> None:
        slot = turn.slot
        assert slot
        with self._changed:
            slot.users -= 1
            slot.used = time.monotonic()
            going = self._settle(slot)
        if going:
            self._close(slot, going)

    def _give_up(self, turn: Turn) -> None:
        assert turn.slot
        with self._changed:
            with suppress(ValueError):  # it was taken out meanwhile
                turn.slot.queue.remove(turn)
            self._changed.notify_all()  # perhaps nobody waits for a load any more

    def _advance(self, slot: Slot) -> None:
        """Let in whoever is next; have the model loaded if it is not."""
        if slot.state is State.OUT and slot.queue and not self._closed:
            slot.state = State.LOADING
            threading.Thread(target=self._load, args=(slot,), name="alight-load", daemon=True).start()
        # While another model waits for room, nobody new comes in here: else it might wait for ever.
        held = self._wanting_room not in (None, slot) and not slot.handed_over
        while slot.state is State.IN and slot.queue and slot.users < self._slots_each:
            if held or slot.outgrown:
                break
            assert slot.model
            turn = slot.queue.popleft()
            if turn.admit(slot.model):
                slot.users += 1
                if turn.keep_alive is not None:
                    slot.keep_alive = turn.keep_alive

    def _settle(self, slot: Slot) -> Model | None:
        """After somebody left: let in the next, or take the model out; then it is the caller's to close."""
        self._changed.notify_all()
        self._advance(slot)
        if not slot.idle or self._closed:
            return None
        dead = isinstance(slot.model, RestartingModel) and not slot.model.alive
        over = slot.unwanted or dead or slot.outgrown or slot.keep_alive <= 0
        return self._take_out(slot) if over else None

    # -- loading ---------------------------------------------------------------------------------

    def _load(self, slot: Slot) -> None:
        """Load a model, in a thread of its own, and let in those who wait for it."""
        try:
            with self._one_load:
                self._bring_in(slot)
        except Exception as error:
            if not isinstance(error, AlightError):
                log.exception("loading %s failed", slot.name)
                error = EngineError(f"loading failed: {type(error).__name__}: {error}")
            with self._changed:
                self._forget(slot)
                waiting, slot.queue = slot.queue, deque()
                self._changed.notify_all()
            for turn in waiting:
                turn.fail(error)
            return
        with self._changed:
            going = self._settle(slot)
        if going:
            self._close(slot, going)

    def _bring_in(self, slot: Slot) -> None:
        artifact = slot.artifact if slot.own_artifact and slot.artifact else self._stored(slot.name)
        with self._changed:
            wanted = max((turn.context or 0 for turn in slot.queue), default=0)
        wish = memory.wished(artifact, self._options, wanted)
        while True:
            options, needed = self._make_room(slot, artifact, wish)
            model = self._model(slot, artifact, options)
            with self._changed:
                if self._closed:
                    raise _closed()
                slot.artifact, slot.model = artifact, model
                slot.needed, slot.mapped = needed, artifact.size if options.mmap else 0
            started = time.monotonic()
            try:
                model.load()
                break
            except DoesNotFit:  # by the target's own count, which may be of an accelerator's memory
                if self._unload_idle():
                    continue
                if options == self._options:
                    raise
                wish = self._options
        target, seconds = model.info.target, time.monotonic() - started
        log.info("loaded %s with target %s in %.1f s", artifact.name, target, seconds)
        with self._changed:
            slot.state, slot.loaded_at, slot.used = State.IN, time.time(), time.monotonic()
            slot.context = max(model.info.context, wanted)
            if self._unloader is None:
                self._unloader = threading.Thread(
                    target=self._unload_expired, name="alight-unloader", daemon=True
                )
                self._unloader.start()

    def _model(self, slot: Slot, artifact: Artifact, options: LoadOptions) -> RestartingModel:
        def start(on_crash: Callable[[EngineCrashed], None]) -> WorkerModel:
            patience = self._hang_after
            return WorkerModel(artifact, options, target=self._target, on_crash=on_crash, patience=patience)

        return RestartingModel(
            start, slot.crashes, lambda: self._crashed(slot), lambda: self._room_again(slot, artifact)
        )

    @contextmanager
    def _room_again(self, slot: Slot, artifact: Artifact) -> Iterator[None]:
        """A block around the restart of a model: others may have taken its memory since it crashed.

        Raises:
            DoesNotFit: it no longer fits by the limit that was set.
        """
        # Whoever loads now may wait for room, and so for those who use `slot`: then it is not waited for.
        while not (held := self._one_load.acquire(timeout=0.05)) and self._wanting_room is None:
            pass
        try:
            while not memory.fits(slot.needed, self._free(slot)) and self._unload_idle():
                pass
            free = self._free(slot)
            if self._max_memory is not None and not memory.fits(slot.needed, free):
                raise DoesNotFit(f"model {artifact.name!r}", slot.needed, free)
            yield
        finally:
            if held:
                self._one_load.release()

    def _make_room(self, slot: Slot, artifact: Artifact, wish: LoadOptions) -> tuple[LoadOptions, int]:
        """Unload what is idle until the model fits, and wait for what is not. Gives the options to load it
        with, and the bytes that it will then take.

        Args:
            wish: the server's own options, or others, which are given up where they do not fit.

        Raises:
            DoesNotFit: not even alone, by the limit that was set. (The machine's is for the target to judge.)
        """
        options, needed = wish, memory.needed(artifact, wish)
        try:
            while self._others_must_go(slot, needed):
                self._unload_idle()
        finally:
            with self._changed:
                self._wanting_room = None
                for other in self._slots.values():
                    self._advance(other)
        if options != self._options and not memory.fits(needed, self._free(slot)):
            log.warning("%s gets no context of %s tokens: there is no room", artifact.name, options.context)
            options, needed = self._options, memory.needed(artifact, self._options)
        if self._max_memory is not None and not memory.fits(needed, self._free(slot)):
            options = memory.fitted(artifact, options, self._free(slot))
            needed = memory.needed(artifact, options)
        return options, needed

    def _others_must_go(self, slot: Slot, needed: int) -> bool:
        """Wait until there is room for a model (False), or something idle to unload for it (True)."""
        with self._changed:
            while not self._closed and not memory.fits(needed, self._free(slot)):
                others = [s for s in self._slots.values() if s is not slot and not s.handed_over]
                if any(other.idle for other in others):
                    return True
                if not any(other.state in (State.IN, State.CLOSING) for other in others):
                    return False  # it has all the room there is
                if not slot.queue:
                    raise EngineError("nobody waits for the model any more")
                self._wanting_room = slot
                self._changed.wait()
            return False

    def _free(self, slot: Slot) -> int:
        with self._changed:
            others = [other for other in self._slots.values() if other is not slot]
            taken, mapped = sum(s.needed for s in others), sum(s.mapped for s in others)
        return memory.free(self._max_memory, taken, mapped)

    # -- unloading -------------------------------------------------------------------------------

    def _unload_idle(self) -> bool:
        """Unload the idle model that was used the longest time ago; those that may expire go first."""
        with self._changed:
            idle = [slot for slot in self._slots.values() if slot.idle]
            if not idle:
                return False
            slot = min(idle, key=lambda slot: (slot.expires is None, slot.used))
            going = self._take_out(slot)
        log.info("unloading %s to make room", slot.name)
        self._close(slot, going)
        return True

    def _unload_expired(self) -> None:
        """Unload models whose time is over: a thread that waits for that."""
        while True:
            with self._changed:
                expiring = [(slot.expires, slot) for slot in self._slots.values() if slot.expires is not None]
                when, slot = min(expiring, key=lambda pair: pair[0], default=(None, None))
                if self._closed:
                    return
                if when is None or slot is None or when > time.monotonic():
                    self._changed.wait(None if when is None else when - time.monotonic())
                    continue
                going = self._take_out(slot)
            log.info("unloading %s, which nobody used for %.0f s", slot.name, slot.keep_alive)
            self._close(slot, going)

    def _crashed(self, slot: Slot) -> None:
        with self._changed:
            going = self._settle(slot)  # the next request loads it again; one that runs restarts it itself
        if going:
            self._close(slot, going)

    def _take_out(self, slot: Slot) -> Model:
        assert slot.model
        slot.state = State.CLOSING
        return slot.model

    def _close(self, slot: Slot, model: Model) -> None:
        """Close a model that was taken out. Its memory is free when this returns."""
        model.close()
        with self._changed:
            self._forget(slot)
            self._changed.notify_all()
            self._advance(slot)

    def _forget(self, slot: Slot) -> None:
        slot.state, slot.model, slot.unwanted = State.OUT, None, False
        slot.needed = slot.mapped = 0
        slot.keep_alive = self._keep_alive


def _closed() -> EngineError:
    return EngineError("the server is shutting down")


__all__ = ["MAX_WAITING", "Loaded", "Models", "Offer"]
