"""Who waits for a model, in which order, and for how long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import httpx
import pytest
from test_server_helpers import LIMIT, TickModel, answer_threads, chat, wait_until

from alight.errors import Busy, EngineError
from alight.server import Models, running
from alight.target import LoadOptions, Usage

BOTH = pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])


@pytest.fixture
def models() -> Iterator[Models]:
    """One model, for one request at a time; three more may wait."""
    with Models(options=LoadOptions(slots=1), max_waiting=3) as models:
        models.add("tick", TickModel(ticks=2))
        yield models


def waiting(models: Models) -> int:
    return models.loaded()[0].waiting


def test_first_come_first_served(models: Models) -> None:
    order: list[int] = []

    def ask(number: int) -> None:
        with models.use("tick"):
            order.append(number)

    with ThreadPoolExecutor(3) as pool, models.use("tick"):
        for number in range(3):
            pool.submit(ask, number)
            wait_until(lambda n=number: waiting(models) == n + 1)  # type: ignore[misc]
        assert order == []
        assert models.loaded()[0].running == 1
    assert order == [0, 1, 2]
    assert (models.loaded()[0].running, waiting(models)) == (0, 0)


def test_as_many_at_once_as_there_are_slots() -> None:
    with Models(options=LoadOptions(slots=4)) as models, ThreadPoolExecutor(12) as pool:
        models.add("tick", TickModel())
        inside, most, lock = 0, 0, threading.Lock()

        def ask(_: int) -> None:
            nonlocal inside, most
            with models.use("tick"):
                with lock:
                    inside += 1
                    most = max(most, inside)
                threading.Event().wait(0.02)
                with lock:
                    inside -= 1

        list(pool.map(ask, range(40)))
        assert most == 4


def test_the_queue_is_full(models: Models) -> None:
    with ThreadPoolExecutor(3) as pool, models.use("tick"):
        asked = [pool.submit(models.get, "tick") for _ in range(3)]
        wait_until(lambda: waiting(models) == 3)
        with pytest.raises(Busy, match=r"1 requests run and 3 wait\nTry again in 1 seconds") as caught:
            models.get("tick")
        assert caught.value.retry_after == 1
    assert all(one.result() for one in asked)
    assert models.get("tick")


def test_how_long_to_stay_away(models: Models) -> None:
    with models.use("tick"):
        threading.Event().wait(1.1)
    with ThreadPoolExecutor(3) as pool, models.use("tick"):
        for _ in range(3):
            pool.submit(models.get, "tick")
        wait_until(lambda: waiting(models) == 3)
        with pytest.raises(Busy) as caught:
            models.get("tick")
    assert 5 <= caught.value.retry_after <= 120  # three wait, and each takes more than a second


def test_who_gives_up_makes_room(models: Models) -> None:
    turns = [models.use("tick") for _ in range(3)]

    def wait(number: int) -> str:
        try:
            with turns[number]:
                return "served"
        except CancelledError:
            return "gone"

    with ThreadPoolExecutor(3) as pool:
        with models.use("tick"):
            asked = [pool.submit(wait, number) for number in range(3)]
            wait_until(lambda: waiting(models) == 3)
            assert turns[1].cancel()
            assert waiting(models) == 2
        assert [one.result() for one in asked] == ["served", "gone", "served"]
    assert not turns[0].cancel()
    assert (models.loaded()[0].running, waiting(models)) == (0, 0)


def test_cancelled_before_it_began(models: Models) -> None:
    turn = models.use("tick")
    assert turn.cancel()
    with pytest.raises(CancelledError), turn:
        raise AssertionError
    assert models.get("tick")


def test_a_server_that_closes_tells_who_waits(models: Models) -> None:
    with ThreadPoolExecutor(1) as pool, models.use("tick"):
        asked = pool.submit(models.get, "tick")
        wait_until(lambda: waiting(models) == 1)
        models.close()
        with pytest.raises(EngineError, match="shutting down"):
            asked.result()


def test_the_speed_of_late(models: Models) -> None:
    for decode_seconds in (1.0, 2.0):
        turn = models.use("tick")
        with turn:
            turn.note(Usage(5, 11, 0.5, decode_seconds))
    assert models.loaded()[0].speed == pytest.approx(10 + 0.2 * (5 - 10))


# -- over HTTP -------------------------------------------------------------------------------------


@pytest.fixture
def client(models: Models) -> Iterator[httpx.Client]:
    with running(models) as url, httpx.Client(base_url=url, timeout=LIMIT, trust_env=False) as client:
        yield client


@BOTH
def test_a_full_queue_is_503_with_retry_after(client: httpx.Client, models: Models, path: str) -> None:
    with ThreadPoolExecutor(3) as pool, models.use("tick"):
        asked = [pool.submit(client.post, path, json=chat(stream=False)) for _ in range(3)]
        wait_until(lambda: waiting(models) == 3)
        refused = client.post(path, json=chat())
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "busy" in str(refused.json()["error"])
        assert client.get("/health").status_code == 200
    assert [one.result().status_code for one in asked] == [200] * 3


@BOTH
def test_hanging_up_leaves_the_queue(client: httpx.Client, models: Models, path: str) -> None:
    with models.use("tick"):
        with pytest.raises(httpx.ReadTimeout):
            client.post(path, json=chat(), timeout=0.5)
        wait_until(lambda: waiting(models) == 0 and not answer_threads())
    assert client.post(path, json=chat(stream=False)).status_code == 200
