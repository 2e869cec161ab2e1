"""Which models a server offers, and when they are loaded and let go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from test_server_helpers import TickModel, wait_until

from alight.artifact import Artifact
from alight.errors import BadInput, EngineError, ModelNotFound
from alight.server import Models
from alight.server.keep_alive import FOREVER, parse
from alight.store import Store
from alight.target import LoadOptions


@pytest.fixture
def models(store: Store, clock: Path) -> Iterator[Models]:
    with Models(store, LoadOptions(context=64), target="clock") as models:
        yield models
    assert not psutil.Process().children()


def loads(clock: Path) -> list[str]:
    """What was loaded, in order."""
    file = clock / "loads"
    return (
        [line.split()[0].removesuffix(":latest") for line in file.read_text().splitlines()]
        if file.exists()
        else []
    )


def is_loaded(models: Models, name: str) -> bool:
    return models.find(name).model is not None


def test_names(models: Models) -> None:
    models.add("Clock", TickModel())
    assert models.names() == ["clock", "other", "third", "tiny"]
    offers = {offer.name: offer for offer in models.list()}
    assert [name for name, offer in offers.items() if offer.model] == ["clock"]
    assert offers["clock"].artifact is None
    assert offers["tiny"].artifact is not None


def test_one_model_by_any_of_its_names(models: Models, clock: Path, store: Store) -> None:
    same = [models.get(name) for name in ("tiny", "tiny:latest", "TINY")]
    assert len({id(model) for model in same}) == 1
    assert same[0].info.context == 64
    assert loads(clock) == ["tiny"]
    digest = store.get("tiny:latest").digest  # the three have the same bytes: the first by name answers
    assert models.get(digest).info.name.startswith(("tiny", "other", "third"))


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


def test_two_first_requests_load_once(models: Models, clock: Path) -> None:
    (clock / "wait").touch()
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(models.get, "tiny") for _ in range(8)]
        wait_until(lambda: bool(loads(clock)))
        assert not is_loaded(models, "tiny")  # listing does not wait for the load
        assert [(m.name, m.state.value) for m in models.loaded()] == [("tiny", "loading")]
        (clock / "wait").unlink()
        assert len({id(future.result()) for future in found}) == 1
    assert loads(clock) == ["tiny"]


def test_a_failed_load_is_told_to_all_and_tried_again(models: Models, clock: Path) -> None:
    (clock / "error").write_text("not now")
    (clock / "wait").touch()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(models.get, "tiny") for _ in range(3)]
        wait_until(lambda: models.loaded() != () and models.loaded()[0].waiting == 3)
        (clock / "wait").unlink()
        for one in asked:
            with pytest.raises(EngineError, match="not now"):
                one.result()
    assert loads(clock) == ["tiny"]
    (clock / "error").unlink()
    assert models.get("tiny")


def test_two_models_at_once(models: Models) -> None:
    with models.use("tiny") as one, models.use("other") as two:
        assert one.complete("ticks=1").text == two.complete("ticks=1").text == "tick "
        pids = {model.pid for model in models.loaded()}
    assert len(pids) == len(psutil.Process().children()) == 2
    assert all(model.memory > 10_000_000 for model in models.loaded())
    assert models.find("tiny").memory > 10_000_000


# -- unloading -------------------------------------------------------------------------------------


def test_unload_waits_for_the_last_user(models: Models) -> None:
    with models.use("tiny") as model, models.use("tiny"):
        assert not models.unload("tiny")
        assert models.find("tiny").model is model
        assert model.complete("ticks=1").text == "tick "
    assert not is_loaded(models, "tiny")
    assert not psutil.Process().children()  # its memory is free
    assert models.get("tiny") is not model


def test_a_new_user_keeps_the_model(models: Models, clock: Path) -> None:
    with models.use("tiny"):
        models.unload("tiny")
        with models.use("tiny"):
            pass
    assert is_loaded(models, "tiny")
    assert loads(clock) == ["tiny"]


def test_unload_now(models: Models) -> None:
    assert models.unload("tiny")  # not loaded yet: nothing to do
    models.get("tiny")
    assert models.unload("tiny")
    assert not psutil.Process().children()


def test_unload_while_it_loads(models: Models, clock: Path) -> None:
    (clock / "wait").touch()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(models.get, "tiny")
        wait_until(lambda: bool(loads(clock)))
        assert not models.unload("tiny")
        (clock / "wait").unlink()
        assert asked.result()  # who asked before still gets it
    wait_until(lambda: not psutil.Process().children())


def test_keep_alive(models: Models) -> None:
    def stays(name: str) -> float | None:
        at = models.find(name).expires_at
        return None if at is None else at - time.time()

    models.get("tiny")
    assert 290 < (stays("tiny") or 0) <= 300
    models.get("tiny", keep_alive=60)
    assert 50 < (stays("tiny") or 0) <= 60
    models.get("tiny")  # says nothing, so it stays as it was
    assert 50 < (stays("tiny") or 0) <= 60
    models.get("tiny", keep_alive=FOREVER)
    assert stays("tiny") is None
    assert is_loaded(models, "tiny")
    models.get("tiny", keep_alive=0)
    assert not is_loaded(models, "tiny")
    models.get("tiny")
    assert 290 < (stays("tiny") or 0) <= 300


def test_it_is_unloaded_when_its_time_is_over(models: Models) -> None:
    models.get("tiny", keep_alive=FOREVER)
    models.get("third", keep_alive=100)
    models.get("other", keep_alive=0.2)
    wait_until(lambda: not is_loaded(models, "other"))
    wait_until(lambda: len(psutil.Process().children()) == 2)
    with models.use("third", keep_alive=0.2) as model:
        assert model.complete("ticks=10 pause=0.05").text == "tick " * 10  # longer than that, but in use
    wait_until(lambda: not is_loaded(models, "third"))
    assert is_loaded(models, "tiny")


def test_keep_alive_zero_while_others_use_it(models: Models) -> None:
    with models.use("tiny"):
        models.get("tiny", keep_alive=0)
        assert is_loaded(models, "tiny")
    assert not is_loaded(models, "tiny")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("300ms", 0.3), ("90", 90), (90, 90), (2.5, 2.5),
        (0, 0), ("0", 0), ("0s", 0), (-1, FOREVER), ("-1", FOREVER), ("-5m", FOREVER), (1e300, FOREVER),
        ("inf", FOREVER), (None, None), ("", None),
    ],
)  # fmt: skip
def test_durations(value: float | str | None, seconds: float | None) -> None:
    assert parse(value) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("value", ["soon", "5 m", "5x", "m", "--1m", "nan", "5m extra"])
def test_what_is_no_duration(value: str) -> None:
    with pytest.raises(BadInput, match="keep_alive is"):
        parse(value)


# -- models that are in no store -----------------------------------------------------------------------


def test_a_model_that_came_loaded_stays(models: Models) -> None:
    clock = TickModel()
    models.add("clock", clock)
    assert not models.unload("clock")
    assert models.get("clock", keep_alive=0) is clock
    assert not clock.closed
    with pytest.raises(BadInput, match="already"):
        models.add("clock:latest", clock)


def test_a_file_that_is_in_no_store(models: Models, tmp_path: Path, clock: Path) -> None:
    models.offer(Artifact.loose((tmp_path / "tiny.gguf").rename(tmp_path / "loose.gguf")))
    assert "loose" in models.names()
    assert not is_loaded(models, "loose")
    assert models.get("loose").info.name == "loose"
    assert models.unload("loose")
    assert models.find("loose").artifact
    assert models.get("loose")
    assert loads(clock) == ["loose", "loose"]


def test_close(models: Models) -> None:
    ticks = TickModel()
    models.add("clock", ticks)
    models.get("tiny")
    models.close()
    models.close()
    assert ticks.closed
    assert not psutil.Process().children()
    with pytest.raises(EngineError, match="shutting down"):
        models.get("tiny")


def test_close_while_models_load(models: Models, clock: Path) -> None:
    (clock / "wait").touch()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(models.get, name) for name in ("tiny", "tiny", "other")]
        wait_until(lambda: bool(loads(clock)) and len(models.loaded()) == 2)
        models.close()
        for one in asked:
            with pytest.raises(EngineError):
                one.result()
    assert not psutil.Process().children()
    assert not [t for t in threading.enumerate() if t.name in ("alight-load", "alight-unloader")]


def test_close_while_one_is_used(models: Models) -> None:
    with models.use("tiny") as model:
        stream = model.generate("ticks=1000000 pause=0.01")
        next(stream)
        models.close()
        with pytest.raises(EngineError, match="closed"):
            list(stream)


def test_what_is_removed_from_the_store_is_no_longer_offered(models: Models, store: Store) -> None:
    models.get("tiny")
    models.unload("tiny")
    store.remove("tiny")
    assert models.names() == ["other", "third"]
    with pytest.raises(ModelNotFound):
        models.get("tiny")


def test_a_damaged_model_is_left_out(models: Models, store: Store) -> None:
    other = store.get("tiny")
    store.blob(other.digest).chmod(0o644)
    store.blob(other.digest).write_bytes(b"{")
    assert models.list() == []
