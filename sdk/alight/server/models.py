"""The models a server offers: those of a store, loaded when they are first asked for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType

from alight import api
from alight.artifact import Artifact
from alight.errors import BadInput, EngineError, ModelNotFound, StoreError
from alight.store import DIGEST, Store, normal_name, short_name
from alight.target import LoadOptions, Model

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """One model as the server lists it."""

    name: str  # without ":latest"
    artifact: Artifact | None  # None: it was handed over loaded, without its files
    model: Model | None  # None: it is not loaded now


@dataclass(slots=True)
class _Slot:
    """A model's place. The lock is held while it loads, so that two first requests load it once."""

    artifact: Artifact | None = None
    model: Model | None = None
    handed_over: bool = False  # came loaded, by `add`: once closed, nothing here could bring it back
    users: int = 0
    unwanted: bool = False  # to be closed when its last user leaves
    lock: threading.Lock = field(default_factory=threading.Lock)


class Models:
    """Which models a server offers. Thread-safe.

    Args:
        store: where they come from; None offers only those given to `add`.
        options: how each is loaded.
        target: the runtime; "auto" takes the first that is here and reads the model's format.
    """

    def __init__(
        self, store: Store | None = None, options: LoadOptions | None = None, *, target: str = "auto"
    ) -> None:
        self._store = store
        self._options = options or LoadOptions()
        self._target = target
        self._slots: dict[str, _Slot] = {}  # by full name
        self._lock = threading.Lock()  # guards _slots; never held while a model loads
        self._closed = False

    def names(self) -> list[str]:
        """The names of all models, sorted, without ":latest"."""
        stored = self._store.names() if self._store else []
        with self._lock:
            loaded = [name for name, slot in self._slots.items() if slot.model]
        return sorted(short_name(n) for n in {*stored, *loaded})

    def list(self) -> list[Offer]:
        """All models, by name. One that is damaged in the store is logged and left out."""
        offers = []
        for name in self.names():
            try:
                offers.append(self.find(name))
            except (StoreError, ModelNotFound) as error:  # or it was removed since names() was read
                log.warning("not listed: %s", error)
        return offers

    def find(self, name: str) -> Offer:
        """One model, loaded or not.

        Raises:
            ModelNotFound: with the nearest names. StoreError: it is damaged in the store.
        """
        full = self._full_name(name)
        with self._lock:
            slot = self._slots.get(full)
        if slot and slot.model:
            return Offer(short_name(full), slot.artifact, slot.model)
        return Offer(short_name(full), self._stored(full), None)

    def get(self, name: str) -> Model:
        """The model, loaded now if it was not. It may be unloaded later: `use` prevents that.

        Raises:
            ModelNotFound, and what loading raises: DoesNotFit, TargetUnavailable, EngineError, ….
        """
        with self.use(name) as model:
            return model

    @contextmanager
    def use(self, name: str) -> Iterator[Model]:
        """The model, loaded now if it was not, and kept until the block ends."""
        full = self._full_name(name)
        slot = self._slot(full)
        with slot.lock:
            model = slot.model or self._load(slot, full)
            slot.users += 1
            slot.unwanted = False
        try:
            yield model
        finally:
            with slot.lock:
                slot.users -= 1
                if slot.unwanted and not slot.users:
                    self._unload(slot)

    def add(self, name: str, model: Model, artifact: Artifact | None = None) -> None:
        """Offer a model that is loaded already. From now on it is closed with the others."""
        full = normal_name(name)
        with self._lock:
            if full in self._slots:
                raise BadInput(
                    f"the server offers a model named {name!r} already", hint="Add it under another name."
                )
            self._slots[full] = _Slot(artifact, model, handed_over=True)

    def unload(self, name: str) -> None:
        """Free a model's memory, once its last user has left. It loads again when asked for."""
        full = self._full_name(name)
        with self._lock:
            slot = self._slots.get(full)
        if slot is None:
            self._stored(full)  # raises if there is no such model
            return
        with slot.lock:
            if slot.users:
                slot.unwanted = True
            else:
                self._unload(slot)

    def close(self) -> None:
        """Close all models; a later `use` is an EngineError. Safe to call twice."""
        with self._lock:
            self._closed = True
            slots = [*self._slots.values()]
        for slot in slots:
            with slot.lock:
                if slot.model:
                    slot.model.close()
                    slot.model = None

    def __enter__(self) -> Models:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside ----------------------------------------------------------------------------------

    def _slot(self, full: str) -> _Slot:
        with self._lock:
            if full in self._slots:
                return self._slots[full]
        self._stored(full)  # no slot for a model that does not exist
        with self._lock:
            return self._slots.setdefault(full, _Slot())

    def _load(self, slot: _Slot, full: str) -> Model:
        if self._closed:
            raise EngineError("the server is shutting down")
        artifact = self._stored(full)
        started = time.monotonic()
        model = api.load_artifact(artifact, self._options, target=self._target)
        slot.artifact, slot.model = artifact, model
        log.info(
            "loaded %s with target %s in %.1f s", artifact.name, model.info.target, time.monotonic() - started
        )
        return model

    def _unload(self, slot: _Slot) -> None:
        slot.unwanted = False
        if slot.model and not slot.handed_over:
            slot.model.close()
            slot.model = None

    def _stored(self, full: str) -> Artifact:
        if self._store:
            with suppress(ModelNotFound):
                return self._store.get(full)
        raise ModelNotFound(short_name(full), self.names())  # suggests also models that are in no store

    def _full_name(self, name: str) -> str:
        try:
            full = normal_name(name)
        except BadInput:  # what cannot be a name cannot be found either
            raise ModelNotFound(name, self.names()) from None
        return normal_name(self._stored(full).name) if DIGEST.fullmatch(full) else full
