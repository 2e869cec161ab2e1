"""Answers in progress: they stream, they stop when nobody listens, and their errors arrive."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from test_server_helpers import LIMIT, PushedTicks, TickModel, answer_threads, chat, wait_until

from alight.errors import AlightError, ContextExceeded, DoesNotFit, EngineError, InvalidModelFile, Unsupported
from alight.server import Models, running, stream
from alight.target import LoadOptions

Serve = Callable[[TickModel], httpx.Client]
BOTH = pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(model: TickModel) -> httpx.Client:
            models = stack.enter_context(Models())
            models.add("tick", model)
            url = stack.enter_context(running(models))
            return stack.enter_context(httpx.Client(base_url=url, timeout=LIMIT, trust_env=False))

        yield start
    wait_until(lambda: not answer_threads())


@BOTH
def test_pieces_arrive_while_the_model_still_works(serve: Serve, path: str) -> None:
    gate = threading.Event()
    client = serve(TickModel(ticks=3, gate=gate, gate_at=2))
    with client.stream("POST", path, json=chat(stream=True)) as response:
        lines = response.iter_lines()
        while "tick" not in next(lines):
            pass
        gate.set()  # without streaming, the line above would wait for this one
        assert "tick" in "".join(lines)


@BOTH
def test_hanging_up_cancels_a_stream(serve: Serve, path: str) -> None:
    model = TickModel()
    client = serve(model)
    with client.stream("POST", path, json=chat(stream=True)) as response:
        next(response.iter_lines())
    wait_until(lambda: model.cancelled == 1 and not answer_threads())
    assert client.get("/health").status_code == 200


@BOTH
def test_hanging_up_cancels_an_answer_in_one_piece(serve: Serve, path: str) -> None:
    model = TickModel()
    client = serve(model)
    with pytest.raises(httpx.ReadTimeout):
        client.post(path, json=chat(stream=False), timeout=0.5)
    wait_until(lambda: model.cancelled == 1 and not answer_threads())


@BOTH
@pytest.mark.parametrize("streamed", [True, False])
def test_hanging_up_before_the_first_token(serve: Serve, path: str, streamed: bool) -> None:
    gate = threading.Event()
    model = TickModel(gate=gate, pause=1)  # time enough for the server to notice
    client = serve(model)
    with pytest.raises(httpx.ReadTimeout):
        client.post(path, json=chat(stream=streamed), timeout=0.5)
    wait_until(lambda: model.begun == 1)
    gate.set()
    wait_until(lambda: not answer_threads())
    assert (
        model.made <= 2
    )  # the gate may open before the server notices, and one more token is under way then


def test_a_client_that_does_not_read_holds_the_model_back(serve: Serve) -> None:
    model = TickModel(pause=0, text="x" * 20_000)
    client = serve(model)
    with client.stream("POST", "/api/chat", json=chat()):
        made = -1
        while made != model.made:  # until it stands still
            made = model.made
            time.sleep(1)
        assert stream.AHEAD <= made < 2000  # the rest of 20 TB is in no buffer
    wait_until(lambda: model.cancelled == 1)


@pytest.mark.parametrize("kind", [TickModel, PushedTicks])
def test_a_client_that_does_not_read_is_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, kind: type[TickModel]
) -> None:
    monkeypatch.setattr(stream, "STALLED", 0.2)
    model = kind(pause=0.001, text="x" * 100_000)
    client = serve(model)
    with client.stream("POST", "/api/chat", json=chat()) as response:
        wait_until(lambda: model.cancelled == 1 and not answer_threads())
        assert "stopped reading" in [*response.iter_lines()][-1]  # should it read on after all


def test_a_slow_reader_is_not_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STALLED", 0.5)
    monkeypatch.setattr(stream, "AHEAD", 4)
    client = serve(PushedTicks(ticks=60, pause=0, text="x" * 300_000))
    with client.stream("POST", "/api/chat", json=chat()) as response:
        lines = 0
        for line in response.iter_lines():
            time.sleep(0.05)  # takes longer than STALLED in all
            lines += '"done":false' in line
    assert lines == 60


def test_many_at_once_and_the_server_still_answers(serve: Serve) -> None:
    gate = threading.Event()
    client = serve(TickModel(ticks=20, gate=gate, gate_at=10))
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(client.post, "/api/chat", json=chat(stream=False)) for _ in range(12)]
        wait_until(lambda: len(answer_threads()) == 12)
        assert client.get("/health").status_code == 200
        gate.set()
        assert [a.result().json()["message"]["content"] for a in answers] == ["tick " * 20] * 12


def test_one_answer_too_many_is_refused() -> None:
    model = TickModel()
    with Models(options=LoadOptions(slots=1), max_waiting=0) as models:
        models.add("tick", model)
        with running(models) as url, httpx.Client(base_url=url, timeout=LIMIT, trust_env=False) as client:
            with client.stream("POST", "/api/chat", json=chat()) as response:
                lines = response.iter_lines()  # kept: httpx hangs up when it is collected
                next(lines)
                refused = client.post("/v1/chat/completions", json=chat())
                ollama = client.post("/api/chat", json=chat())
            assert refused.status_code == ollama.status_code == 503
            assert refused.json()["error"]["code"] == "busy"
            assert "model 'tick' is busy" in ollama.json()["error"]
            assert int(refused.headers["Retry-After"]) >= 1
            wait_until(lambda: not answer_threads())
            missing = client.post("/v1/chat/completions", json=chat(stream=True, model="nope"))
            assert missing.status_code == 404


ERRORS: list[tuple[Exception, int, str]] = [
    (ContextExceeded(5000, 4096), 400, "context_length_exceeded"),
    (Unsupported("no chat template"), 400, "unsupported"),
    (InvalidModelFile("broken"), 500, "invalid_model_file"),
    (DoesNotFit("tick", 10**9, 10**8), 503, "does_not_fit"),
    (EngineError("it broke"), 500, "server_error"),
    (AlightError("something else"), 500, "server_error"),
    (RuntimeError("a bug"), 500, "server_error"),
]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("error", "status", "code"), ERRORS, ids=lambda value: str(value)[:20])
def test_an_error_before_the_first_token_has_its_status(
    serve: Serve, error: Exception, status: int, code: str, streamed: bool
) -> None:
    client = serve(TickModel(error=error))
    openai = client.post("/v1/chat/completions", json=chat(stream=streamed))
    assert openai.status_code == status
    assert openai.json()["error"]["code"] == code
    assert str(error).partition("\n")[0] in openai.json()["error"]["message"]
    ollama = client.post("/api/chat", json=chat(stream=streamed))
    assert ollama.status_code == status
    assert str(error).partition("\n")[0] in ollama.json()["error"]


@pytest.mark.parametrize("error", [EngineError("it broke"), RuntimeError("it broke")])
def test_an_error_in_the_middle_is_the_last_line(serve: Serve, error: Exception) -> None:
    client = serve(TickModel(error=error, fail_at=3))
    ollama = client.post("/api/chat", json=chat())
    lines = [json.loads(line) for line in ollama.text.splitlines()]
    assert ollama.status_code == 200
    assert [line["message"]["content"] for line in lines[:3]] == ["tick "] * 3
    assert list(lines[3]) == ["error"]
    assert "it broke" in lines[3]["error"]

    openai = client.post("/v1/chat/completions", json=chat(stream=True))
    events = [line.removeprefix("data: ") for line in openai.text.splitlines() if line]
    assert "it broke" in json.loads(events[-1])["error"]["message"]
    assert "[DONE]" not in openai.text

    assert client.post("/api/chat", json=chat(stream=False)).status_code == 500
