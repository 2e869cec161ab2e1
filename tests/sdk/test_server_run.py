"""Starting and stopping the server."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from test_server_helpers import LIMIT, TickModel, answer_threads, chat, wait_until

from alight.errors import AlightError, BadInput
from alight.server import Models, running, serve

# A server in a process of its own, with a model that ticks; a stuck one never gives its second token.
SERVER = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from test_server_helpers import TickModel
from alight.server import Models, serve

gate = threading.Event() if sys.argv[2] == "stuck" else None
model = TickModel(gate=gate, gate_at=1)
with Models() as models:
    models.add("tick", model)
    serve(models, ready=lambda url: print(url, flush=True))
print("closed", model.closed, flush=True)
"""


@contextmanager
def process(kind: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["ticking", "stuck"])
def test_a_signal_ends_it_with_a_stream_open(kind: str, number: signal.Signals) -> None:
    with (
        process(kind) as (child, url),
        httpx.stream("POST", f"{url}/api/chat", json=chat(), timeout=LIMIT) as response,
    ):
        lines = response.iter_lines()
        assert "tick" in next(lines)
        child.send_signal(number)
        assert "shutting down" in [*lines][-1]
        out, err = child.communicate(timeout=LIMIT)
        assert (child.returncode, out.strip()) == (0, "closed True")
        assert "Traceback" not in err


def test_a_signal_ends_it_while_idle() -> None:
    with process("ticking") as (child, url), httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200  # the connection stays open
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=LIMIT)
        assert (child.returncode, out.strip()) == (0, "closed True")


@pytest.fixture
def models() -> Iterator[Models]:
    with Models() as models:
        models.add("tick", TickModel())
        yield models


def test_running_gives_a_free_port_and_ends(models: Models) -> None:
    with running(models) as one, running(models) as two:
        assert one != two
        for url in (one, two):
            assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tick"
    for url in (one, two):
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
    assert not [t for t in threading.enumerate() if t.name == "alight-server"]


def test_running_ends_with_a_stream_open(models: Models) -> None:
    with running(models) as url:
        client = httpx.Client(base_url=url, timeout=LIMIT)
        response = client.send(client.build_request("POST", "/api/chat", json=chat()), stream=True)
        lines = response.iter_lines()
        next(lines)
    assert "shutting down" in [*lines][-1]
    client.close()
    wait_until(lambda: not answer_threads())


def test_running_closes_when_the_block_fails(models: Models) -> None:
    with pytest.raises(ZeroDivisionError), running(models) as url:
        _ = 1 / 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_serve_in_a_thread_takes_no_signals(models: Models) -> None:
    urls: list[str] = []
    # daemon: only a signal to the main thread would end it, so it lasts as long as the tests
    threading.Thread(target=serve, args=(models,), kwargs={"ready": urls.append}, daemon=True).start()
    wait_until(lambda: bool(urls))
    assert httpx.get(f"{urls[0]}/health").status_code == 200


@pytest.mark.parametrize(
    "start", [lambda m, p: serve(m, port=p), lambda m, p: running(m, port=p).__enter__()]
)
def test_port_in_use(models: Models, start: object) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AlightError, match=rf"port {port} .*in use\n.*--port"):
            start(models, port)


def test_bad_addresses(models: Models) -> None:
    with pytest.raises(BadInput, match="70000"):
        serve(models, port=70000)
    with pytest.raises(BadInput, match="not an address"):
        serve(models, host="nowhere.invalid")
    with pytest.raises(AlightError, match="cannot listen on 192"):  # an address of nobody (RFC 5737)
        serve(models, host="192.0.2.1")


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost", "::1", "::"])
def test_the_url_works_from_here(models: Models, host: str) -> None:
    if ":" in host and not _has_ipv6():
        pytest.skip("no IPv6 on this machine")
    with running(models, host) as url:
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
