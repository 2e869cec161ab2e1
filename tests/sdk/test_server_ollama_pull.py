"""Ollama's pull over a real connection, from a real hub on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gguf_writer import F32, gguf, tiny
from hub_server import HubServer, Repository

from alight import api
from alight.artifact import digest_of
from alight.server import Models, running
from alight.sources import web
from alight.store import Store

TINY = tiny()
DIGEST = digest_of(TINY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "tiny.gguf").write_bytes(TINY)
    store = Store(tmp_path / "alight-home/models")
    api.pull(str(tmp_path / "tiny.gguf"), name="tiny", store=store)
    return store


@pytest.fixture
def client(store: Store) -> Iterator[httpx.Client]:
    with (
        Models(store, target="echo") as models,
        running(models) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        yield client


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(web, "RETRY_DELAYS", (0.0,))
        yield server


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def names(client: httpx.Client) -> set[str]:
    return {model["name"] for model in client.get("/api/tags").json()["models"]}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def gguf_of(size: int) -> bytes:
    return gguf({"general.architecture": "llama"}, [("t", (32, size // 128), F32, 0)], os.urandom(size))


def test_pull_from_a_hub(client: httpx.Client, store: Store, hub: HubServer) -> None:
    weights = gguf_of(3 << 20)
    hub.repositories["org/Some-Model"] = Repository(
        {"Some-Model-Q8_0.gguf": weights, "Some-Model-F16.gguf": TINY}
    )
    name = "hf.co/org/Some-Model:Q8_0"
    told = lines(client.post("/api/pull", json={"model": name}))
    assert told[0] == {"status": "pulling manifest"}
    assert [line["status"] for line in told[-3:]] == [
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    moving = [line for line in told if "completed" in line]
    assert all(set(line) == {"status", "digest", "total", "completed"} for line in moving)
    assert moving[-1] == {
        "status": f"pulling {digest_of(weights)[7:19]}",
        "digest": digest_of(weights),
        "total": len(weights),
        "completed": len(weights),
    }
    assert "hf.co/org/some-model:q8_0" in names(client)
    body = {"model": name, "messages": [user("hi")], "stream": False}
    assert client.post("/api/chat", json=body).status_code == 200, "clients chat by the name that they pulled"

    asked = len(hub.requests)
    assert lines(client.post("/api/pull", json={"model": name}))[-1] == {"status": "success"}
    assert len(hub.requests) == asked, "it is there already"
    assert client.request("DELETE", "/api/delete", json={"model": name}).status_code == 200
    assert store.names() == ["tiny:latest"]


def test_pull_by_alights_own_form(client: httpx.Client, hub: HubServer) -> None:
    hub.repositories["org/m"] = Repository({"m-Q8_0.gguf": gguf_of(1 << 16)})
    whole = client.post("/api/pull", json={"name": "hf://org/m", "stream": False, "insecure": True})
    assert whole.json() == {"status": "success"}
    assert "m:latest" in names(client)
    assert client.post("/api/show", json={"model": "hf://org/m"}).status_code == 200
    told = lines(client.post("/api/create", json={"model": "mine", "from": "hf://org/m", "system": "x"}))
    assert told[-1] == {"status": "success"}
    client.request("DELETE", "/api/delete", json={"model": "m"})
    assert client.post("/api/create", json={"model": "mine", "from": "hf.co/org/m"}).status_code == 200
    assert "hf.co/org/m:latest" in names(client)


def test_pull_what_is_here(client: httpx.Client) -> None:
    told = lines(client.post("/api/pull", json={"model": "registry.ollama.ai/library/tiny"}))
    assert [line["status"] for line in told] == [
        "pulling manifest",
        f"pulling {DIGEST[7:19]}",
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]


@pytest.mark.parametrize(
    "name", ["llama3.2", "llama3.2:1b", "user/model", "hf:x", "/etc", "~", ".", "../x.gguf", "ftp://a/b"]
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_pulled(client: httpx.Client, name: str, stream: bool) -> None:
    response = client.post("/api/pull", json={"model": name, "stream": stream})
    assert response.status_code in (400, 404)
    assert "hf://" in response.json()["error"]


def test_a_path_of_this_machine_is_not_told_about(client: httpx.Client, tmp_path: Path) -> None:
    errors = [
        client.post("/api/pull", json={"model": str(path)}).json()["error"].replace(str(path), "")
        for path in (tmp_path / "tiny.gguf", tmp_path / "nothing.gguf")
    ]
    assert errors[0] == errors[1]


def test_a_hub_that_fails_in_the_middle(client: httpx.Client, store: Store, hub: HubServer) -> None:
    hub.repositories["org/m"] = Repository({"m-Q8_0.gguf": gguf_of(1 << 20)})
    hub.faults.corrupt.add("m-Q8_0.gguf")
    told = lines(client.post("/api/pull", json={"model": "hf://org/m"}))
    assert list(told[-1]) == ["error"]
    assert client.post("/api/pull", json={"model": "hf://org/m", "stream": False}).status_code == 500
    assert store.names() == ["tiny:latest"]


def test_a_pull_ends_when_its_client_goes_away(client: httpx.Client, store: Store, hub: HubServer) -> None:
    hub.repositories["org/m"] = Repository({"m-Q8_0.gguf": gguf_of(4 << 20)})
    hub.faults.hold_after = 2 << 20
    with client.stream("POST", "/api/pull", json={"model": "hf://org/m"}) as response:
        next(line for line in response.iter_lines() if "completed" in line)
    hub.faults.hold_after = None
    hub.released.set()
    # The next one waits for the first to have ended, and goes on with what that brought.
    assert lines(client.post("/api/pull", json={"model": "hf://org/m"}))[-1] == {"status": "success"}
    assert store.verify() == []
