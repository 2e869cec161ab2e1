"""Workers that die: the others go on, and the model is back by itself."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from test_cli_support import Serving
from test_server_helpers import LIMIT, answer_threads, chat, wait_until

from alight.errors import EngineCrashed
from alight.server import Models, restarts, running
from alight.server.restarts import Crashes
from alight.store import Store
from alight.target import Completion

BOTH = pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
KINDS = pytest.mark.parametrize("order", ["kill", "segv"])


@pytest.fixture
def models(store: Store, clock: Path) -> Iterator[Models]:
    with Models(store, target="clock") as models:
        yield models
    assert not psutil.Process().children()


@pytest.fixture
def client(models: Models) -> Iterator[httpx.Client]:
    with running(models) as url, httpx.Client(base_url=url, timeout=LIMIT, trust_env=False) as client:
        yield client


def ask(content: str, model: str = "tiny", **fields: Any) -> dict[str, Any]:
    return chat(content, model=model, **fields)


def said(response: httpx.Response) -> str:
    """The text of an answer in one piece, of either API."""
    assert response.status_code == 200, response.text
    body = response.json()
    message = body["message"] if "message" in body else body["choices"][0]["message"]
    return str(message["content"])


def pids(client: httpx.Client) -> dict[str, int]:
    return {m["name"]: m["pid"] for m in client.get("/alight/v1/models").json()["models"]}


def kill(client: httpx.Client, model: str = "tiny") -> int:
    pid = pids(client)[model]
    os.kill(pid, signal.SIGKILL)
    return pid


# -- in the middle of an answer ----------------------------------------------------------------------


@BOTH
def test_killed_in_the_middle_of_an_answer(client: httpx.Client, path: str) -> None:
    other = client.build_request("POST", "/api/chat", json=ask("ticks=60 pause=0.02", "other"))
    others = client.send(other, stream=True)
    other_lines = others.iter_lines()
    assert "tick" in next(other_lines)
    with client.stream("POST", path, json=ask("ticks=100000 pause=0.01", stream=True)) as response:
        lines = response.iter_lines()
        while "tick" not in next(lines):
            pass
        pid = kill(client)
        *_, last = [line for line in lines if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    message = error["message"] if isinstance(error, dict) else error
    assert "the process of model 'tiny' was ended by SIGKILL" in message
    assert "Send the request again" in message
    if isinstance(error, dict):
        assert error["code"] == "engine_crashed"

    assert said(client.post(path, json=ask("ticks=2", stream=False))) == "tick tick "  # it is back
    assert pids(client)["tiny"] != pid
    # The other one has noticed nothing.
    assert len([line for line in other_lines if '"tick ' in line]) == 59
    others.close()


@KINDS
@pytest.mark.parametrize("streamed", [True, False])
@BOTH
def test_killed_before_the_first_token(
    client: httpx.Client, tmp_path: Path, path: str, streamed: bool, order: str
) -> None:
    """The request is run again on a new worker, and its client sees nothing of all this."""
    content = f"ticks=3 {order}=0 once={tmp_path / 'once'}"
    response = client.post(path, json=ask(content, stream=streamed))
    assert response.status_code == 200
    assert response.text.count("tick ") == 3 if streamed else said(response) == "tick " * 3
    assert "error" not in response.text
    assert client.get("/alight/v1/models").json()["models"][0]["crashes"] == 1


@BOTH
def test_a_request_that_kills_every_worker(client: httpx.Client, path: str) -> None:
    """It is tried twice and not for ever; with its first token sent, once."""
    refused = client.post(path, json=ask("ticks=3 segv=0"))
    assert refused.status_code == 500
    assert "SIGSEGV: the hands fell off" in refused.text
    assert client.get("/alight/v1/models").json()["models"] == []
    assert said(client.post(path, json=ask("ticks=1", stream=False))) == "tick "
    broken = client.post(path, json=ask("ticks=3 segv=2", stream=False))
    assert broken.status_code == 500
    assert said(client.post(path, json=ask("ticks=1", stream=False))) == "tick "


def test_all_that_run_on_it_are_told_or_run_again(models: Models, clock: Path) -> None:
    with models.use("tiny") as model:
        begun = [model.generate(f"ticks=5 gate={clock / 'never'} at=1") for _ in range(4)]
        waiting = [model.generate(f"ticks=2 gate={clock / 'gate'}") for _ in range(4)]
        for stream in begun:
            while not next(stream).text:
                pass
        for stream in waiting:
            assert next(stream).text == ""
        pid = models.loaded()[0].pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        (clock / "gate").touch()
        for stream in begun:
            with pytest.raises(EngineCrashed):
                list(stream)
        assert [Completion.of(stream).text for stream in waiting] == ["tick tick "] * 4
        assert model.tokenize("a") == [97]
        assert model.score([1, 2]).tokens == (1, 2)
    assert len((clock / "loads").read_text().splitlines()) == 2  # all together started one


# -- at other times ----------------------------------------------------------------------------------


def test_killed_while_idle(models: Models) -> None:
    model = models.get("tiny")
    pid = models.loaded()[0].pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: models.loaded() == ())
    assert models.find("tiny").model is None
    with models.use("tiny") as again:
        assert again is not model
        assert again.complete("ticks=1").text == "tick "


@pytest.mark.parametrize(
    "call", [lambda m: m.tokenize("a"), lambda m: m.score([1, 2]), lambda m: m.embed(["a"])]
)
def test_killed_between_two_calls_of_a_request(models: Models, call: Callable[[Any], Any]) -> None:
    with models.use("tiny") as model:
        call(model)
        pid = models.loaded()[0].pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        call(model)
        assert models.loaded()[0].pid not in (None, pid)


def test_killed_while_loading(client: httpx.Client, clock: Path) -> None:
    (clock / "crash").write_text("once")
    assert said(client.post("/api/chat", json=ask("ticks=1", stream=False))) == "tick "
    client.post("/alight/v1/unload", json={"model": "tiny"})

    (clock / "crash").write_text("always")
    refused = client.post("/api/chat", json=ask("ticks=1"))
    assert refused.status_code in (500, 503)
    assert "SIGABRT: the spring broke" in refused.text
    assert client.get("/alight/v1/models").json()["models"] == []


# -- again and again -----------------------------------------------------------------------------------


@BOTH
def test_one_that_keeps_crashing_is_left_alone_for_a_while(
    client: httpx.Client, clock: Path, path: str
) -> None:
    (clock / "crash").write_text("always")
    client.post(path, json=ask("ticks=1"))
    refused = client.post(path, json=ask("ticks=1"))
    while "times in a row" not in refused.text:
        refused = client.post(path, json=ask("ticks=1"))
    assert refused.status_code == 503
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert "model 'tiny' crashed" in refused.text
    assert "SIGABRT: the spring broke" in refused.text
    loads = (clock / "loads").read_text()
    assert client.post(path, json=ask("ticks=1")).status_code == 503
    assert (clock / "loads").read_text() == loads  # it was not even started
    (clock / "crash").unlink()
    assert said(client.post(path, json=ask("ticks=1", "other", stream=False))) == "tick "  # it did nothing
    wait_until(lambda: client.post(path, json=ask("ticks=1")).status_code == 200)  # and then it is back


def test_how_long_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now)
    crashes = Crashes("tiny")
    pauses = []
    for number in range(1, 12):
        crashes.note(EngineCrashed(f"it fell over for the {number}th time"))
        try:
            crashes.check()
            pauses.append(0.0)
        except EngineCrashed as error:
            pauses.append(error.retry_after)
            assert f"crashed {number} times in a row" in error.message
            assert f"the {number}th time" in error.message
        now += pauses[-1]
        crashes.check()
    assert pauses == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    crashes.note_answer()
    crashes.note(EngineCrashed("again"))
    crashes.check()
    assert crashes.total == 12


def test_fifty_kills_leave_nothing_behind(store: Store, clock: Path) -> None:
    """Kill the worker in the middle of an answer, fifty times, and look at the server's process."""
    with (
        Serving("--target", "clock", "--no-advertise") as server,
        httpx.Client(base_url=server.url, timeout=LIMIT, trust_env=False) as client,
    ):
        process = psutil.Process(server.process.pid)

        def figures() -> tuple[int, int, int]:
            return process.num_fds(), process.num_threads(), len(process.children(recursive=True))

        def settled() -> tuple[int, int, int]:
            """The figures once the threads of the last answer have ended."""
            seen = [figures()]
            wait_until(lambda: not seen.append(figures()) and len(seen) > 20 and len({*seen[-20:]}) == 1)  # type: ignore[func-returns-value]
            return seen[-1]

        def one_kill(number: int) -> None:
            path = ("/v1/chat/completions", "/api/chat")[number % 2]
            with client.stream("POST", path, json=ask("ticks=100000 pause=0.005", stream=True)) as response:
                lines = response.iter_lines()
                while "tick" not in next(lines):
                    pass
                kill(client)
                assert "SIGKILL" in "".join(lines)
            assert said(client.post(path, json=ask("ticks=2", stream=False))) == "tick tick "

        for number in range(10):
            one_kill(number)
        before, memory = settled(), process.memory_info().rss
        for number in range(40):
            one_kill(number)
        assert settled() == before
        assert process.memory_info().rss < memory + 4_000_000
        assert not [p for p in process.children() if p.status() == psutil.STATUS_ZOMBIE]
        assert client.get("/alight/v1/models").json()["models"][0]["crashes"] == 50
        worker = pids(client)["tiny"]
        code, _, errors = server.stop()
    assert code == 0
    assert "Traceback" not in errors
    wait_until(lambda: not psutil.pid_exists(worker))
    assert not answer_threads()


def test_an_engine_that_cannot_go_on_is_started_anew(client: httpx.Client) -> None:
    assert said(client.post("/v1/chat/completions", json=ask("ticks=1")))
    before = pids(client)["tiny"]
    broken = client.post("/v1/chat/completions", json=ask("ticks=2 break=1"))
    assert broken.status_code == 500
    wait_until(lambda: not psutil.pid_exists(before))
    assert said(client.post("/v1/chat/completions", json=ask("ticks=1")))
    assert pids(client)["tiny"] != before
