"""Looking after a running server: alight's own API, `alight ps`, `alight stop`, and /metrics."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_cli_support import Serving, alight, fails, ok
from test_server_helpers import LIMIT, TickModel, chat, wait_until

from alight.devices import throttling
from alight.server import Models, running
from alight.store import Store
from alight.target import LoadOptions


@pytest.fixture
def models(store: Store, clock: Path) -> Iterator[Models]:
    with Models(store, LoadOptions(slots=2), target="clock", max_waiting=1) as models:
        models.add("tick", TickModel(ticks=2))
        yield models


@pytest.fixture
def client(models: Models) -> Iterator[httpx.Client]:
    with running(models) as url, httpx.Client(base_url=url, timeout=LIMIT, trust_env=False) as client:
        yield client


def ask(content: str, model: str = "tiny", **fields: Any) -> dict[str, Any]:
    return chat(content, model=model, stream=False, **fields)


def loaded(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in client.get("/alight/v1/models").json()["models"]}


# -- alight's own API --------------------------------------------------------------------------------


def test_what_is_loaded(client: httpx.Client) -> None:
    assert [*loaded(client)] == ["tick"]
    assert loaded(client)["tick"]["expires_at"] is None  # it stays
    client.post("/api/chat", json=ask("ticks=5"))
    tiny = loaded(client)["tiny"]
    assert (tiny["state"], tiny["target"], tiny["context"]) == ("loaded", "clock", 4096)
    assert (tiny["slots"], tiny["running"], tiny["waiting"], tiny["crashes"]) == (2, 0, 0, 0)
    assert tiny["memory_bytes"] > 10_000_000
    assert tiny["tokens_per_second"] == 400  # 4 tokens after the first, in 0.01 s
    assert psutil.Process(tiny["pid"]).ppid() == os.getpid()
    left = datetime.fromisoformat(tiny["expires_at"]) - datetime.now(UTC)
    assert 200 < left.total_seconds() <= 300
    assert datetime.fromisoformat(tiny["loaded_at"]) <= datetime.now(UTC)


def test_load_and_unload(client: httpx.Client) -> None:
    answer = client.post("/alight/v1/load", json={"model": "tiny", "keep_alive": -1})
    assert answer.json() == {"model": "tiny", "loaded": True}
    assert loaded(client)["tiny"]["expires_at"] is None
    for _ in range(2):
        assert client.post("/alight/v1/unload", json={"model": "tiny"}).json()["unloaded"] is True
        assert "tiny" not in loaded(client)
    assert client.post("/alight/v1/unload", json={"model": "tick"}).json()["unloaded"] is False
    for verb in ("load", "unload"):
        assert client.post(f"/alight/v1/{verb}", json={"model": "tinny"}).status_code == 404
        assert client.post(f"/alight/v1/{verb}", json={}).status_code == 400
        assert client.post(f"/alight/v1/{verb}", json={"model": "tiny", "force": 1}).status_code == 400
    assert client.post("/alight/v1/load", json={"model": "tiny", "keep_alive": "soon"}).status_code == 400


def test_ollama_clients_see_and_say_how_long_it_stays(client: httpx.Client) -> None:
    def left() -> float:
        (model,) = [m for m in client.get("/api/ps").json()["models"] if m["name"] == "tiny:latest"]
        assert model["size"] > 10_000_000
        return (datetime.fromisoformat(model["expires_at"]) - datetime.now(UTC)).total_seconds()

    client.post("/api/chat", json=ask("ticks=1"))
    assert 200 < left() <= 300
    client.post("/api/chat", json=ask("ticks=1", keep_alive="1h"))
    assert 3000 < left() <= 3600
    client.post("/api/chat", json=ask("ticks=1", keep_alive=-1))
    assert left() > 1e9
    client.post("/api/chat", json=ask("ticks=1", keep_alive=0))
    assert "tiny" not in loaded(client)
    client.post("/api/generate", json={"model": "tiny"})  # only loads it
    assert 200 < left() <= 300
    client.post("/api/generate", json={"model": "tiny", "keep_alive": 0})
    assert "tiny" not in loaded(client)


# -- alight ps, alight stop --------------------------------------------------------------------------


@pytest.fixture
def server(store: Store, clock: Path) -> Iterator[Serving]:
    with Serving("--target", "clock", "--slots", "3", "--keep-alive", "1h", "--no-advertise") as server:
        yield server


def post(server: Serving, **fields: Any) -> None:
    httpx.post(f"{server.url}/api/chat", json={**ask("ticks=5"), **fields}, timeout=LIMIT, trust_env=False)


def test_ps_and_stop(server: Serving) -> None:
    on = ("--on", server.url)
    assert "No model is loaded" in alight("ps", *on).stderr
    assert ok("ps", "--json", *on) == "[]\n"
    post(server)
    post(server, model="other", keep_alive=-1)
    head, other, tiny = ok("ps", *on, COLUMNS="120").splitlines()
    assert head.split()[:4] == ["NAME", "STATE", "TARGET", "MEMORY"]
    assert tiny.split()[:3] == ["tiny", "loaded", "clock"]
    assert "0/3" in tiny
    assert tiny.split()[-2:] in (["60", "min"], ["59", "min"])
    assert other.split()[-1] == "stays"
    about = json.loads(ok("ps", "--json", *on))
    assert [model["name"] for model in about] == ["other", "tiny"]

    assert ok("stop", "tiny", "other", *on) == "stopped tiny\nstopped other\n"
    assert json.loads(ok("ps", "--json", *on)) == []
    assert not any(psutil.pid_exists(model["pid"]) for model in about)
    assert "no model named 'tinny'" in fails("stop", "tinny", *on)


def test_stop_one_that_answers(server: Serving, clock: Path) -> None:
    body = chat(f"ticks=3 gate={clock / 'gate'} at=1", model="tiny")
    with httpx.stream(
        "POST", f"{server.url}/api/chat", json=body, timeout=LIMIT, trust_env=False
    ) as response:
        lines = response.iter_lines()
        assert "tick" in next(lines)
        said = ok("stop", "tiny", "--on", server.url)
        assert said == "will stop when its last request ends: tiny\n"
        (clock / "gate").touch()
        assert '"done":true' in [*lines][-1]
    wait_until(lambda: json.loads(ok("ps", "--json", "--on", server.url)) == [])


def test_ps_where_no_server_runs() -> None:
    assert "cannot reach" in fails("ps", "--on", "http://127.0.0.1:9")
    assert "cannot reach" in fails("stop", "tiny", "--on", "http://127.0.0.1:9")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_server(server: Serving, number: signal.Signals, clock: Path) -> None:
    body = chat("ticks=100000 pause=0.01", model="tiny")
    with httpx.stream(
        "POST", f"{server.url}/api/chat", json=body, timeout=LIMIT, trust_env=False
    ) as response:
        lines = response.iter_lines()
        assert "tick" in next(lines)
        workers = psutil.Process(server.process.pid).children()
        assert len(workers) == 1
        server.process.send_signal(number)
        code = server.process.wait(LIMIT)
    assert code == (0 if number != signal.SIGKILL else -signal.SIGKILL)
    wait_until(lambda: not any(worker.is_running() for worker in workers))


def test_models_that_are_named_stay(store: Store, clock: Path, tmp_path: Path) -> None:
    loose = tmp_path / "tiny.gguf"
    loose.rename(tmp_path / "loose.gguf")
    with Serving("other", tmp_path / "loose.gguf", "--target", "clock", "--no-advertise") as server:
        for name in ("other", "loose"):
            post(server, model=name)
        about = json.loads(ok("ps", "--json", "--on", server.url))
        assert [(m["name"], m["expires_at"]) for m in about] == [("loose", None), ("other", None)]
        assert len({m["pid"] for m in about} | {server.process.pid}) == 3  # each in its own process


def test_bad_options_of_serve() -> None:
    assert "keep_alive is 'soon'" in fails("serve", "--keep-alive", "soon")
    assert "--max-queue" in fails("serve", "--max-queue", "-1", code=2)


# -- metrics -----------------------------------------------------------------------------------------

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(client: httpx.Client) -> Figures:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def of(figures: Figures, name: str, **labels: str) -> float:
    return figures[name, tuple(sorted(labels.items()))]


def test_metrics_of_answers(client: httpx.Client) -> None:
    client.post("/api/chat", json=ask("ticks=5"))
    client.post("/v1/chat/completions", json=chat("ticks=3", model="TINY:latest", stream=True))
    client.post("/v1/chat/completions", json=ask("x", "nope-nope"))
    figures = scrape(client)
    assert of(figures, "alight_time_to_first_token_seconds_count", model="tiny") == 2
    assert of(figures, "alight_inter_token_seconds_count", model="tiny") == 4 + 2
    assert of(figures, "alight_answers_total", model="tiny") == 2
    assert of(figures, "alight_prompt_tokens_total", model="tiny") == 2 * (1 + len("ticks=5") + 1)
    assert of(figures, "alight_completion_tokens_total", model="tiny") == 8
    assert of(figures, "alight_cached_tokens_total", model="tiny") == 4
    assert of(figures, "alight_drafted_tokens_total", model="tiny") == 8
    assert of(figures, "alight_accepted_tokens_total", model="tiny") == 6
    requests = {labels: value for (name, labels), value in figures.items() if name == "alight_requests_total"}
    told = {tuple(dict(labels).values()): value for labels, value in requests.items()}
    assert told[("POST", "/api/chat", "200")] == 1
    assert told[("POST", "/v1/chat/completions", "200")] == 1
    assert told[("POST", "/v1/chat/completions", "404")] == 1


def test_metrics_of_models(client: httpx.Client, models: Models, clock: Path) -> None:
    def crash_once() -> None:
        content = f"ticks=2 kill=0 once={clock / 'once'}"
        assert client.post("/api/chat", json=ask(content)).status_code == 200

    crash_once()
    with models.use("tiny"):
        figures = scrape(client)
    assert of(figures, "alight_running_requests", model="tiny") == 1
    assert of(figures, "alight_waiting_requests", model="tiny") == 0
    assert of(figures, "alight_slots", model="tiny") == 2
    assert of(figures, "alight_model_memory_bytes", model="tiny") > 10_000_000
    assert of(figures, "alight_worker_crashes_total", model="tiny") == 1
    assert of(figures, "alight_engine_kv_cells_used", model="tiny") == 5  # what the engine says itself
    assert of(figures, "alight_engine_made_total", model="tiny") == 2
    assert of(figures, "alight_info", version=client.get("/health").json()["version"]) == 1
    assert any(name == "process_resident_memory_bytes" for name, _ in figures)


def test_paths_of_strangers_are_not_counted_one_by_one(client: httpx.Client) -> None:
    for number in range(5):
        client.get(f"/nowhere/{number}")
        client.get(f"/v1/models/nobody{number}")
    routes = {
        dict(labels)["route"]: value
        for (name, labels), value in scrape(client).items()
        if "requests_total" in name
    }
    assert routes == {"none": 5, "/v1/models/{name}": 5}


def test_a_worker_that_does_not_answer_does_not_hold_up_a_scrape(
    client: httpx.Client, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alight.server.worker_model._GRACE", 0.5)
    with client.stream("POST", "/api/chat", json=chat("ticks=5 pause=0.2 hang=1", model="tiny")) as response:
        lines = response.iter_lines()  # kept: httpx hangs up when it is collected
        assert "tick" in next(lines)
        wait_until(lambda: not [name for name, _ in scrape(client) if name.startswith("alight_engine")])
        assert of(scrape(client), "alight_running_requests", model="tiny") == 1


def test_metrics_want_the_key_as_well(models: Models) -> None:
    with running(models, api_key="secret") as url:
        assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 401
        assert httpx.get(f"{url}/alight/v1/models", trust_env=False).status_code == 401


def test_throttling_of_a_raspberry_pi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "devices/platform/soc/soc:firmware/get_throttled"
    file.parent.mkdir(parents=True)
    file.write_text("50005\n")
    reasons = throttling.reasons(tmp_path)
    assert {name for name, holds in reasons.items() if holds} == {
        "under_voltage", "throttled", "under_voltage_occurred", "throttled_occurred",
    }  # fmt: skip
    file.unlink()
    command = tmp_path / "vcgencmd"
    command.write_text("#!/bin/sh\necho throttled=0x8\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [name for name, holds in throttling.reasons(tmp_path).items() if holds] == [
        "soft_temperature_limit"
    ]
    command.write_text("#!/bin/sh\necho VCHI initialization failed\n")
    assert throttling.reasons(tmp_path) == {}


def test_throttling_of_an_x86_processor(tmp_path: Path) -> None:
    assert throttling.events(tmp_path) is None
    for core, count in ((0, 3), (1, 4)):
        file = tmp_path / f"devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count"
        file.parent.mkdir(parents=True)
        file.write_text(f"{count}\n")
    assert throttling.events(tmp_path) == 7
