"""What all requests have in common: keys, origins, size limits, the log, the node's description."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gguf_writer import tiny
from test_server_helpers import TickModel, answer_threads, chat, wait_until

import alight
from alight import api
from alight.server import Models, running
from alight.store import Store
from alight.testing import EchoModel


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Models]:
    (tmp_path / "tiny.gguf").write_bytes(tiny())
    store = Store(tmp_path / "models")
    api.pull(str(tmp_path / "tiny.gguf"), name="tiny", store=store)
    with Models(store, target="echo") as models:
        models.add("echo", EchoModel())
        models.add("tick", TickModel())
        yield models


@pytest.fixture
def client(models: Models) -> Iterator[httpx.Client]:
    with running(models) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


def test_root_and_health(client: httpx.Client) -> None:
    assert client.get("/").text == "alight is running"
    assert client.head("/").status_code == 200
    assert client.get("/health").json() == {"status": "ok", "version": alight.__version__}


def test_node(models: Models) -> None:
    with running(models, name="kitchen-pi") as url:
        node = httpx.get(f"{url}/alight/v1/node", trust_env=False).json()
    assert (node["name"], node["version"]) == ("kitchen-pi", alight.__version__)
    offered = {model["name"]: model for model in node["models"]}
    assert list(offered) == ["echo", "tick", "tiny"]
    assert offered["echo"]["loaded"] is True
    tiny_model = offered["tiny"]
    assert tiny_model["loaded"] is False
    assert (tiny_model["format"], tiny_model["size"]) == ("gguf", len(tiny()))
    assert tiny_model["digest"].startswith("sha256:")
    assert tiny_model["lineage"].startswith("sha256:")


@pytest.mark.parametrize("key", ["secret", "clé"])
def test_api_key(models: Models, key: str) -> None:
    with running(models, api_key=key) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/").status_code == client.get("/health").status_code == 200
        for path in ("/v1/models", "/api/tags", "/alight/v1/node", "/nowhere"):
            for wrong in (None, b"Bearer wrong", b"Bearer", b"Basic " + key.encode(), b"\xff"):
                headers = {b"Authorization": wrong} if wrong else None
                assert client.get(path, headers=headers).status_code == 401
        assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert isinstance(client.get("/api/tags").json()["error"], str)
        right = {b"Authorization": b"Bearer " + key.encode()}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.post("/api/chat", json=chat(model="echo"), headers=right).status_code == 200


def test_other_web_sites_are_kept_out(client: httpx.Client) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        response = client.post("/api/chat", json=chat(model="echo"), headers={"Origin": origin})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers
    same = {"Origin": str(client.base_url).rstrip("/")}
    assert client.post("/api/chat", json=chat(model="echo"), headers=same).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_bodies_over_the_limit(client: httpx.Client, path: str) -> None:
    declared = client.post(path, content=b"x" * (50 << 20))
    assert declared.status_code == 413
    assert "32 MiB" in declared.text
    chunked = client.post(path, content=(b"x" * (1 << 20) for _ in range(50)))
    assert chunked.status_code == 413
    assert isinstance(chunked.json()["error"], str if path.startswith("/api") else dict)
    just_below = json.dumps(chat(model="echo", user="x" * ((32 << 20) - 1000)))
    assert client.post("/v1/chat/completions", content=just_below).status_code == 200


def test_an_absurd_length_is_refused_before_the_body(client: httpx.Client) -> None:
    with socket.create_connection(
        (client.base_url.host, client.base_url.port or 0), timeout=60
    ) as connection:
        connection.sendall(b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n")
        assert b" 413 " in connection.recv(1000)


def test_hanging_up_inside_the_body(client: httpx.Client) -> None:
    with socket.create_connection(
        (client.base_url.host, client.base_url.port or 0), timeout=60
    ) as connection:
        connection.sendall(b'POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"model":')
    assert client.get("/health").status_code == 200


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What an application that logs everything would see of the server."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = records.append
    handler.addFilter(lambda record: not record.name.startswith("http"))  # our own client logs too
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield records
    root.removeHandler(handler)
    root.setLevel(level)


def access_lines(logged: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in logged if record.name == "alight.server.access"]


def test_the_log_has_requests_but_never_what_is_in_them(
    logged: list[logging.LogRecord], client: httpx.Client
) -> None:
    word = "xyzzy-nobody-else-says-this"
    for fields in ({}, {"stream": True}, {"temperature": -1}, {"tools": [word]}, {"model": "nope"}):
        client.post("/v1/chat/completions?q=" + word, json=chat(word, **{"model": "echo", **fields}))
    client.post("/v1/chat/completions", content=b'{"model": "' + word.encode())
    wait_until(lambda: len(access_lines(logged)) == 6)
    statuses = [line.split()[3] for line in access_lines(logged)]
    assert statuses == ["200", "200", "400", "400", "404", "400"]
    assert not [record for record in logged if word in record.getMessage()]


def test_a_log_line_stays_one_line(logged: list[logging.LogRecord], client: httpx.Client) -> None:
    client.get("/x%0A127.0.0.1%20GET%20/forged")
    wait_until(lambda: bool(access_lines(logged)))
    (line,) = access_lines(logged)
    assert "\n" not in line


def test_a_reset_connection_leaves_nothing_behind(client: httpx.Client) -> None:
    body = json.dumps(chat()).encode()
    head = b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    for _ in range(5):
        connection = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=60)
        connection.sendall(head + body)
        connection.recv(100)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
        connection.close()
    wait_until(lambda: not answer_threads())


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import alight; import alight.server"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtra" in result.stderr
    assert "pip install 'alight[serve]'" in result.stderr
