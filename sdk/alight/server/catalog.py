"""What a server has to offer: the models of a store, and those given to it by hand."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress

from alight.artifact import Artifact
from alight.errors import BadInput, ModelNotFound, StoreError
from alight.server.offers import Loaded, Offer, describe_loaded, describe_offer
from alight.server.restarts import Crashes
from alight.server.turns import Slot, State
from alight.store import DIGEST, Store, normal_name, short_name
from alight.target import Model

log = logging.getLogger(__name__)


class Catalog:
    """The names of models and what is behind them, loaded or not. Thread-safe.

    Args:
        store: where they come from; None offers only those given to `offer` and `add`.
        keep_alive: seconds that each stays loaded after its last request.
        slots: requests of one model that run at once.
    """

    def __init__(self, store: Store | None, keep_alive: float, slots: int) -> None:
        self._store = store
        self._keep_alive = keep_alive
        self._slots_each = slots
        self._slots: dict[str, Slot] = {}  # by full name; one for each model that was asked for
        self._changed = threading.Condition()  # guards all slots; told when one changes its state or users

    @property
    def store(self) -> Store | None:
        """Where the models come from; those that others put there are offered, too."""
        return self._store

    def names(self) -> list[str]:
        """The names of all models, sorted, without ":latest"."""
        stored = self._store.names() if self._store else []
        with self._changed:
            others = [n for n, slot in self._slots.items() if slot.model or slot.own_artifact]
        return sorted(short_name(n) for n in {*stored, *others})

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
        with self._changed:
            slot = self._slots.get(full)
            if slot and (slot.state is State.IN or slot.own_artifact):
                return describe_offer(slot)
        return Offer(short_name(full), self._stored(full), None)

    def loaded(self) -> tuple[Loaded, ...]:
        """What is in memory, or on its way in or out, by name."""
        with self._changed:
            slots = [slot for slot in self._slots.values() if slot.state is not State.OUT]
            slots.sort(key=lambda slot: slot.name)
            return tuple(describe_loaded(slot, self._slots_each) for slot in slots)

    def crashes(self) -> dict[str, int]:
        """How often the process of each model crashed, of those that were asked for."""
        with self._changed:
            return {short_name(name): slot.crashes.total for name, slot in self._slots.items()}

    def add(self, name: str, model: Model, artifact: Artifact | None = None) -> None:
        """Offer a model that is loaded already, in this process. From now on it is closed with the others."""
        slot = self._new(name)
        with self._changed:
            slot.artifact, slot.model = artifact, model
            slot.handed_over, slot.state, slot.loaded_at = True, State.IN, time.time()

    def offer(self, artifact: Artifact) -> None:
        """Offer a model that is in no store, under the artifact's name."""
        slot = self._new(artifact.name)
        with self._changed:
            slot.artifact, slot.own_artifact = artifact, True

    def _new(self, name: str) -> Slot:
        full = normal_name(name)
        with self._changed:
            if full in self._slots:
                raise BadInput(
                    f"the server offers a model named {name!r} already", hint="Add it under another name."
                )
            slot = self._slots[full] = Slot(full, self._keep_alive, Crashes(short_name(full)))
            return slot

    def _slot(self, full: str) -> Slot:
        with self._changed:
            if full in self._slots:
                return self._slots[full]
        self._stored(full)  # no slot for a model that does not exist
        with self._changed:
            new = Slot(full, self._keep_alive, Crashes(short_name(full)))
            return self._slots.setdefault(full, new)

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
