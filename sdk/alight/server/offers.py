"""Models as the manager describes them to the rest of the server."""

from __future__ import annotations

from dataclasses import dataclass

from alight.artifact import Artifact
from alight.server.restarts import RestartingModel
from alight.server.turns import Slot, State
from alight.store import short_name
from alight.target import Model


@dataclass(frozen=True, slots=True)
class Offer:
    """One model as the server lists it."""

    name: str  # without ":latest"
    artifact: Artifact | None  # None: it was handed over loaded, without its files
    model: Model | None  # None: it is not loaded now
    expires_at: float | None = None  # seconds since the epoch when it will be unloaded; None: it stays
    memory: int = 0  # bytes that it takes now


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is in memory, or on its way in or out, and what it does."""

    name: str
    state: State
    model: Model | None  # None: it is on its way
    slots: int  # requests that run at once
    running: int
    waiting: int
    memory: int  # bytes; 0 where it shares the server's process
    pid: int | None
    expires_at: float | None  # seconds since the epoch; None: it stays
    loaded_at: float
    speed: float  # tokens per second of one answer, of late; 0: not known yet
    crashes: int  # since the server began


def describe_offer(slot: Slot) -> Offer:
    name = short_name(slot.name)
    if slot.state is not State.IN:
        return Offer(name, slot.artifact, None)
    return Offer(name, slot.artifact, slot.model, slot.expires_at, _memory(slot.model))


def describe_loaded(slot: Slot, slots: int) -> Loaded:
    return Loaded(
        name=short_name(slot.name),
        state=slot.state,
        model=slot.model if slot.state is State.IN else None,
        slots=slots,
        running=slot.users,
        waiting=len(slot.queue),
        memory=_memory(slot.model),
        pid=slot.model.pid if isinstance(slot.model, RestartingModel) else None,
        expires_at=slot.expires_at,
        loaded_at=slot.loaded_at,
        speed=slot.speed,
        crashes=slot.crashes.total,
    )


def _memory(model: Model | None) -> int:
    return model.memory if isinstance(model, RestartingModel) else 0
