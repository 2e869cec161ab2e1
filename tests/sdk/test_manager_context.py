"""A request that wants a larger context than the model was loaded with: it is loaded anew."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
from test_server_helpers import LIMIT, TickModel, wait_until

from alight.artifact import Artifact
from alight.server import Models, memory, running
from alight.server.turns import Turn
from alight.store import Store
from alight.target import LoadOptions


def contexts(clock: Path) -> list[str]:
    """What each load was asked for."""
    return [line.split()[2] for line in (clock / "loads").read_text().splitlines()]


def context_of(models: Models, name: str, wanted: int | None) -> int:
    with models.use(name, context=wanted) as model:
        return model.info.context


def test_it_grows_and_stays_as_large(store: Store, clock: Path) -> None:
    with Models(store, LoadOptions(context=64), target="clock") as models:
        assert [context_of(models, "tiny", n) for n in (None, 32, 64, 128, None, 100)] == [
            64,
            64,
            64,
            128,
            128,
            128,
        ]
        assert contexts(clock) == ["64", "128"]
        models.unload("tiny")
        assert context_of(models, "tiny", None) == 64, "what was wished for is forgotten then"
        assert context_of(models, "other", 256) == 256
        assert contexts(clock) == ["64", "128", "64", "256"]


def test_nobody_is_interrupted_and_the_order_is_kept(store: Store, clock: Path) -> None:
    order: list[tuple[str, int]] = []
    leave = threading.Event()

    def ask(name: str, context: int | None) -> None:
        with models.use("tiny", context=context) as model:
            order.append((name, model.info.context))
            assert name != "first" or leave.wait(LIMIT)

    def waiting() -> int:
        return models.loaded()[0].waiting

    with Models(store, LoadOptions(context=64), target="clock") as models, ThreadPoolExecutor(3) as pool:
        pool.submit(ask, "first", None)
        wait_until(lambda: bool(order))
        pool.submit(ask, "large", 128)
        wait_until(lambda: waiting() == 1)
        last = pool.submit(ask, "last", None)
        wait_until(lambda: waiting() == 2)
        assert [name for name, _ in order] == ["first"], "who came after it waits, too"
        leave.set()
        last.result(LIMIT)
        wait_until(lambda: len(order) == 3)
    assert order[0] == ("first", 64)
    assert sorted(order[1:]) == [("large", 128), ("last", 128)]


def test_a_wish_that_was_given_up_changes_nothing(store: Store, clock: Path) -> None:
    leave, entered = threading.Event(), threading.Event()

    def stay() -> None:
        with models.use("tiny"):
            entered.set()
            assert leave.wait(LIMIT)

    def give_up(turn: Turn) -> None:
        with suppress(CancelledError), turn:
            raise AssertionError("it was cancelled")

    with Models(store, LoadOptions(context=64), target="clock") as models, ThreadPoolExecutor(2) as pool:
        inside = pool.submit(stay)
        assert entered.wait(LIMIT)
        turn = models.use("tiny", context=128)
        given_up = pool.submit(give_up, turn)
        wait_until(lambda: models.loaded()[0].waiting == 1)
        assert turn.cancel()
        given_up.result(LIMIT)
        assert context_of(models, "tiny", None) == 64, "nobody waits for the first one to leave"
        leave.set()
        inside.result(LIMIT)
    assert contexts(clock) == ["64"]


def test_not_beyond_what_it_was_trained_for_or_what_fits(smollm2_file: Path, clock: Path) -> None:
    artifact = Artifact.loose(smollm2_file)  # trained for 8192
    with Models(None, LoadOptions(context=64), target="clock") as models:
        models.offer(artifact)
        assert [context_of(models, artifact.name, n) for n in (1 << 40, 1 << 40)] == [8192, 8192]
    most = memory.needed(artifact, LoadOptions(context=2048))
    with Models(None, LoadOptions(context=64), target="clock", max_memory=most) as models:
        models.offer(artifact)
        assert [context_of(models, artifact.name, n) for n in (512, 8192, 8000)] == [512, 64, 64]
    assert contexts(clock) == ["8192", "512", "64"], "what cannot be had is tried once"


def test_the_target_finds_it_too_large(store: Store, clock: Path) -> None:
    (clock / "most").write_text("100")
    with Models(store, LoadOptions(context=64), target="clock") as models:
        assert context_of(models, "tiny", 128) == 64
        assert context_of(models, "tiny", 128) == 64
    assert contexts(clock) == ["128", "64"], "what cannot be had is tried once"


def test_what_came_loaded_stays_as_it_is() -> None:
    with Models() as models:
        models.add("tick", TickModel(ticks=1))
        assert context_of(models, "tick", 1 << 20) == 4096


def test_num_ctx_of_a_request(store: Store, clock: Path) -> None:
    with (
        Models(store, LoadOptions(context=64), target="clock") as models,
        running(models) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):

        def ask(path: str, **fields: object) -> int:
            response = client.post(path, json={"model": "tiny", "stream": False, **fields})
            assert response.status_code == 200, response.text
            (loaded,) = client.get("/api/ps").json()["models"]
            return int(loaded["context_length"])

        hi = [{"role": "user", "content": "hi"}]
        assert ask("/api/chat", messages=hi) == 64
        assert ask("/api/chat", messages=hi, options={"num_ctx": 128}) == 128
        assert ask("/api/generate", prompt="hi", options={"num_ctx": 256.0}) == 256
        assert ask("/api/generate", prompt="", options={"num_ctx": 300}) == 300
        assert ask("/api/embed", input="hi", options={"num_ctx": 400}) == 400
        assert ask("/api/chat", messages=hi, options={"num_ctx": -1}) == 400
        client.post("/api/create", json={"model": "large", "from": "tiny", "parameters": {"num_ctx": 512}})
        client.post("/api/generate", json={"model": "tiny", "keep_alive": 0})
        assert ask("/api/chat", model="large", messages=hi) == 512
