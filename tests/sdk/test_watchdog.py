"""Workers that hang: they are noticed, ended and started again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from test_server_helpers import LIMIT, chat

from alight import api
from alight.artifact import Artifact
from alight.errors import EngineCrashed
from alight.server import Models, running
from alight.server.watchdog import Watchdog
from alight.server.worker_model import WorkerModel
from alight.store import Store

PATIENCE = 3.0  # seconds; a worker tells of itself every second
HUNG = "made no progress for 3 seconds"


@pytest.fixture
def model(store: Store, clock: Path) -> Iterator[WorkerModel]:
    artifact: Artifact = api.resolve("tiny", store=store)
    with WorkerModel(artifact, target="clock", patience=PATIENCE) as model:
        model.load()
        yield model
    assert not psutil.Process().children()


def test_a_stopped_process(model: WorkerModel) -> None:
    stream = model.generate("ticks=100000 pause=0.01")
    while not next(stream).text:
        pass
    os.kill(model.pid, signal.SIGSTOP)
    with pytest.raises(EngineCrashed, match=HUNG):
        list(stream)
    with pytest.raises(EngineCrashed, match=HUNG):
        model.tokenize("a")
    assert not model.alive


def test_native_code_that_never_returns(model: WorkerModel) -> None:
    with pytest.raises(EngineCrashed, match=HUNG):
        list(model.generate("ticks=3 hang=1"))


def test_an_engine_that_stands_still(model: WorkerModel, clock: Path) -> None:
    """The process answers; only its engine does nothing."""
    (clock / "counts").touch()
    stream = model.generate(f"ticks=3 gate={clock / 'never'} at=1")
    next(stream)
    assert model.tokenize("a") == [97]
    with pytest.raises(EngineCrashed, match=HUNG):
        list(stream)


def test_an_engine_that_cannot_tell_gets_its_time(model: WorkerModel, clock: Path) -> None:
    stream = model.generate(f"ticks=3 gate={clock / 'gate'} at=1")
    threading.Timer(2 * PATIENCE, (clock / "gate").touch).start()
    assert "".join(chunk.text for chunk in stream) == "tick " * 3


def test_a_client_that_reads_slowly_is_not_the_engine(model: WorkerModel, clock: Path) -> None:
    (clock / "counts").touch()
    stream = model.generate("ticks=2000")
    next(stream)
    time.sleep(2 * PATIENCE)
    assert len([chunk for chunk in stream if chunk.text]) == 2000


def test_nothing_to_do_is_no_hang(model: WorkerModel) -> None:
    assert model.tokenize("a") == [97]
    os.kill(model.pid, signal.SIGSTOP)
    time.sleep(1.5 * PATIENCE)
    os.kill(model.pid, signal.SIGCONT)
    assert model.tokenize("a") == [97]


def test_a_request_of_a_hung_worker_is_run_again(store: Store, clock: Path) -> None:
    with (
        Models(store, target="clock", hang_after=PATIENCE) as models,
        running(models) as url,
        httpx.Client(base_url=url, timeout=LIMIT, trust_env=False) as client,
    ):
        models.get("tiny")
        pid = models.loaded()[0].pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        response = client.post("/api/chat", json=chat("ticks=2", model="tiny", stream=False))
        assert response.json()["message"]["content"] == "tick " * 2
        (loaded,) = models.loaded()
        assert loaded.crashes == 1 and loaded.pid != pid
        assert not psutil.pid_exists(pid)


def test_the_watchdog_itself() -> None:
    hung = threading.Event()
    dog = Watchdog(2.0, hung.set)
    assert not hung.wait(2.5)  # nobody asked for anything
    dog.begin()
    for step in range(30):
        assert not hung.wait(0.1)
        dog.beat(step, busy=True)
    for _ in range(30):
        assert not hung.wait(0.1)
        dog.beat(29, busy=False)  # it waits for its client
    assert hung.wait(LIMIT)
    dog.stop()
