"""Which models a server offers, and when they are loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gguf_writer import tiny
from test_server_helpers import TickModel, wait_until

from alight import api, plugins
from alight.artifact import Artifact
from alight.errors import BadInput, EngineError, ModelNotFound
from alight.server import Models
from alight.store import Store
from alight.target import Availability, LoadOptions, Target


class CountingTarget(Target):
    name = "counting"
    formats = frozenset({"gguf"})

    def __init__(self) -> None:
        self.loaded: list[tuple[str, LoadOptions]] = []
        self.models: list[TickModel] = []
        self.gate: threading.Event | None = None
        self.error: Exception | None = None

    def probe(self) -> Availability:
        return Availability(True, "")

    def load(self, artifact: Artifact, options: LoadOptions) -> TickModel:
        self.loaded.append((artifact.name, options))
        if self.gate:
            self.gate.wait(60)
        if self.error:
            raise self.error
        self.models.append(TickModel())
        return self.models[-1]


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> CountingTarget:
    found = CountingTarget()
    monkeypatch.setattr(plugins, "choose_target", lambda artifact: found)
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(tiny())
    store = Store(tmp_path / "models")
    api.pull(str(file), name="tiny", store=store)
    store.tag("tiny", "tiny:q8")
    return store


@pytest.fixture
def models(store: Store, target: CountingTarget) -> Iterator[Models]:
    with Models(store, LoadOptions(context=64)) as models:
        yield models


def test_names(models: Models) -> None:
    models.add("Clock", TickModel())
    assert models.names() == ["clock", "tiny", "tiny:q8"]
    offers = {offer.name: offer for offer in models.list()}
    assert [name for name, offer in offers.items() if offer.model] == ["clock"]
    assert offers["clock"].artifact is None
    assert offers["tiny"].artifact is not None


def test_one_model_by_any_of_its_names(models: Models, target: CountingTarget, store: Store) -> None:
    same = [models.get(name) for name in ("tiny", "tiny:latest", "TINY", store.get("tiny:latest").digest)]
    assert len({id(model) for model in same}) == 1
    assert [options.context for _, options in target.loaded] == [64]
    assert models.names() == ["tiny", "tiny:q8"]


@pytest.mark.parametrize(
    "name", ["tinny", "nothing like it", "", "../tiny", "tiny:q9", "sha256:" + "0" * 64, "a" * 999]
)
def test_unknown_names(models: Models, name: str) -> None:
    for ask in (models.get, models.find, models.unload):
        with pytest.raises(ModelNotFound):
            ask(name)


def test_nearest_names_are_suggested(models: Models) -> None:
    models.add("clock", TickModel())
    with pytest.raises(ModelNotFound, match="Did you mean clock"):
        models.get("klock")


def test_two_first_requests_load_once(models: Models, target: CountingTarget) -> None:
    target.gate = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(models.get, "tiny") for _ in range(8)]
        wait_until(lambda: bool(target.loaded))
        assert not models.find("tiny").model  # listing does not wait for the load
        target.gate.set()
        assert len({id(future.result()) for future in found}) == 1
    assert len(target.loaded) == 1


def test_a_failed_load_is_tried_again(models: Models, target: CountingTarget) -> None:
    target.error = EngineError("not now")
    with pytest.raises(EngineError):
        models.get("tiny")
    target.error = None
    assert models.get("tiny")


def test_unload_waits_for_the_last_user(models: Models, target: CountingTarget) -> None:
    with models.use("tiny") as model, models.use("tiny"):
        models.unload("tiny")
        assert not target.models[0].closed
        assert models.find("tiny").model is model
    assert target.models[0].closed
    assert models.find("tiny").model is None
    assert models.get("tiny") is not model


def test_a_new_user_keeps_the_model(models: Models, target: CountingTarget) -> None:
    with models.use("tiny"):
        models.unload("tiny")
        with models.use("tiny"):
            pass
    assert not target.models[0].closed


def test_unload_now(models: Models, target: CountingTarget) -> None:
    models.unload("tiny")  # not loaded yet: nothing to do
    models.get("tiny")
    models.unload("tiny")
    assert target.models[0].closed


def test_a_model_that_came_loaded_stays(models: Models) -> None:
    clock = TickModel()
    models.add("clock", clock)
    models.unload("clock")
    assert models.get("clock") is clock
    assert not clock.closed
    with pytest.raises(BadInput, match="already"):
        models.add("clock:latest", clock)


def test_close(models: Models, target: CountingTarget) -> None:
    clock = TickModel()
    models.add("clock", clock)
    models.get("tiny")
    models.close()
    models.close()
    assert clock.closed
    assert target.models[0].closed
    with pytest.raises(EngineError):
        models.get("tiny")


def test_what_is_removed_from_the_store_is_no_longer_offered(models: Models, store: Store) -> None:
    models.get("tiny")
    models.unload("tiny")
    store.remove("tiny")
    assert models.names() == ["tiny:q8"]
    with pytest.raises(ModelNotFound):
        models.get("tiny")


def test_a_damaged_model_is_left_out(models: Models, store: Store) -> None:
    other = store.get("tiny")
    store.blob(other.digest).chmod(0o644)
    store.blob(other.digest).write_bytes(b"{")
    assert models.list() == []
