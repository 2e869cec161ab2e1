"""Discovery over real multicast DNS on the loopback interface, and the client against a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from alight import api
from alight.errors import BadInput, DeviceNotFound, MissingExtra, NetworkError, RemoteError
from alight.lan.client import RemoteServer, connect
from alight.lan.discovery import Advertisement, _Browser, advertise, browse, find
from alight.lan.identity import device_id
from alight.lan.mdns import SERVICE, addresses_of
from alight.target import Sampling

zeroconf = pytest.importorskip("zeroconf")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGHT_API_KEY", raising=False)


@pytest.fixture
def name() -> str:
    """A name that no other test run on this machine has."""
    return f"Test-{secrets.token_hex(4)}"


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def announced(name: str, port: int, **options: Any) -> Advertisement:
    return advertise(name, port, host="127.0.0.1", **options)


# -- discovery -------------------------------------------------------------------------------------


def test_an_announced_server_is_found(name: str, port: int) -> None:
    with announced(name, port, models_digest="abc", properties={"paired": "no"}) as advert:
        assert advert.name == name
        peer = find(name.upper(), 10)
        listed = [p for p in browse(2) if p.name == name]
    assert listed == [peer]
    assert (peer.name, peer.url, peer.host, peer.port) == (
        name,
        f"http://127.0.0.1:{port}",
        "127.0.0.1",
        port,
    )
    assert peer.properties["id"] == device_id()
    assert peer.properties["models"] == "abc"
    assert peer.properties["paired"] == "no"
    assert peer.version == peer.properties["version"]


def test_a_closed_one_is_gone(name: str, port: int) -> None:
    advert = announced(name, port)
    find(name, 10)
    advert.close()
    advert.close()
    with pytest.raises(DeviceNotFound) as caught:
        find(name, 1)
    assert name in str(caught.value)


def test_a_goodbye_is_heard_by_those_who_listen(name: str, port: int) -> None:
    with _Browser() as browser:
        with announced(name, port):
            assert browser.wait_for(lambda peers: next((p for p in peers if p.name == name), None), 10)
        deadline = time.monotonic() + 10
        while any(p.name == name for p in browser.peers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(p.name == name for p in browser.peers())


def test_find_waits_for_one_that_comes_later(name: str, port: int) -> None:
    adverts: list[Advertisement] = []
    later = threading.Timer(0.5, lambda: adverts.append(announced(name, port)))
    later.start()
    try:
        assert find(name, 30).port == port
    finally:
        later.join()
        adverts[0].close()


def test_the_same_name_gets_a_number(name: str, port: int) -> None:
    with announced(name, port), announced(name.lower(), port) as second, announced(name, port) as third:
        assert second.name == f"{name.lower()} (2)"
        assert third.name == f"{name} (3)"
        found = {p.name for p in browse(2)}
    assert {name, f"{name.lower()} (2)", f"{name} (3)"} <= found


def test_two_servers_here_keep_their_ports(name: str, port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other_port = other.getsockname()[1]
        with announced(f"{name}-a", port), announced(f"{name}-b", other_port):
            assert find(f"{name}-a", 10).port == port
            assert find(f"{name}-b", 10).port == other_port


def test_not_found_names_those_that_were(name: str, port: int) -> None:
    with announced(name, port), pytest.raises(DeviceNotFound) as caught:
        find(f"{name}x", 3)
    assert f"Did you mean {name}" in caught.value.hint


@pytest.mark.parametrize("odd", ["Küche a.b 厨房", "é" * 100, "tab\there"])
def test_odd_names_are_announced(odd: str, name: str, port: int) -> None:
    with announced(name + odd, port) as advert:
        assert len(advert.name.encode()) <= 63
        assert find(advert.name, 10).port == port


def test_what_cannot_be_announced_is_refused(port: int) -> None:
    with pytest.raises(BadInput, match="empty"):
        announced("  ", port)
    with pytest.raises(BadInput, match="too long"):
        announced("x", port, properties={"key": "v" * 255})


def test_it_works_where_an_event_loop_runs(name: str, port: int) -> None:
    async def notebook() -> int:
        with announced(name, port):
            return find(name, 10).port

    assert asyncio.run(notebook()) == port


HOSTILE = {
    b"version": b"\xff\xfe\x1b[31mred\x07",
    b"\x1b]0;title": b"x",
    b"id": b"v" * 250,
    b"flag": None,
    **{b"k%d" % i: b"x" * 20 for i in range(200)},
}


@pytest.fixture
def hostile(name: str, port: int) -> Iterator[str]:
    """A server that announces nonsense with a raw zeroconf; yields its name as it should be shown."""
    zc = zeroconf.Zeroconf(interfaces=["127.0.0.1"])
    here = {"parsed_addresses": ["127.0.0.1"], "server": f"{name}.local."}
    infos = [
        zeroconf.ServiceInfo(SERVICE, f"\x9b31m{name}.{SERVICE}", port=port, properties=HOSTILE, **here),
        zeroconf.ServiceInfo(SERVICE, f"{name}-zero.{SERVICE}", port=0, **here),
        zeroconf.ServiceInfo(SERVICE, f"{name}-nowhere.{SERVICE}", port=port, server="nowhere.local."),
    ]
    for info in infos:
        zc.register_service(info, cooperating_responders=True, strict=False)
    yield f"\ufffd31m{name}"
    zc.close()


def test_hostile_records_are_harmless(hostile: str, name: str) -> None:
    peer = find(hostile, 10)
    assert [p for p in browse(2) if name in p.name] == [peer]
    assert len(peer.properties) <= 32
    assert all(text.isprintable() for pair in peer.properties.items() for text in pair)
    assert peer.version.endswith("[31mred\ufffd")


def test_an_unreachable_one_is_listed(name: str, port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()[1]
    with announced(name, port), announced(f"{name}-dead", dead):
        names = [p.name for p in browse(3) if p.name.startswith(name)]
    assert names == [name, f"{name}-dead"]  # the one that answers is the nearer one


def test_addresses() -> None:
    assert addresses_of("localhost") == ["127.0.0.1"]
    assert addresses_of("192.0.2.7") == ["192.0.2.7"]
    with pytest.raises(BadInput, match="not an address"):
        addresses_of("no.such.host.invalid")
    try:
        everywhere = addresses_of("0.0.0.0")
    except NetworkError:
        pytest.skip("this machine has only its loopback interface")
    assert not any(a.startswith("127.") or ":" in a for a in everywhere)


def test_the_device_id_stays(home: Path) -> None:
    first = device_id()
    assert len(first) == 16
    assert device_id() == first
    (home / "device-id").unlink()
    assert device_id() != first
    (home / "device-id").write_text("damaged")
    assert len(device_id()) == 16


def test_without_zeroconf_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zeroconf", None)
    with pytest.raises(MissingExtra, match="serve"):
        browse(0.1)


# -- the client ------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """OpenAI's API, as small as the client needs it. What it does depends on the model's name."""

    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        self.server.seen.append({"path": self.path, "key": self.headers.get("Authorization")})
        if self.path == "/bare/v1/models":
            return self.answer(200, {"hello": 1})
        self.answer(200, {"data": [{"id": "first"}, {"id": "second", "loaded": True}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({"path": self.path, **body})
        model = body["model"]
        if model == "missing":
            return self.answer(404, {"error": {"message": "no model named 'missing'. Did you mean first?"}})
        if model == "locked":
            return self.answer(401, {"error": "an API key is needed"})
        if model == "plain":
            return self.answer(500, "<h1>oops\x1b[2J</h1>")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.stream(model)

    def stream(self, model: str) -> None:
        self.wfile.write(b": keep-alive\n\n")
        if model == "endless":
            try:
                while True:
                    self.event({"choices": [{"delta": {"content": "on "}}]})
                    time.sleep(0.01)
            except OSError:
                self.server.hung_up.set()
                return
        self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for piece in ("Hé", "llo"):
            text = {"text": piece} if self.path == "/v1/completions" else {"delta": {"content": piece}}
            self.event({"choices": [text]})
        if model == "dies":
            return
        if model == "fails":
            return self.event({"error": {"message": "the engine failed"}})
        if model == "garbles":
            self.wfile.write(b"data: {nonsense\n\n")
            return
        self.event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

    def answer(self, status: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict[str, Any]] = []
        self.hung_up = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


HELLO = [{"role": "user", "content": "hello"}]


def test_connect_by_address_and_by_name(server: Server, name: str) -> None:
    with connect(server.url + "/") as remote:
        assert remote.url == server.url
        assert remote.name == f"127.0.0.1:{server.server_port}"
        assert remote.models() == ["first", "second"]
    with announced(name, server.server_port), connect(name.upper(), timeout=10) as remote:
        assert (remote.name, remote.url) == (name, server.url)
        assert remote.model().name == "second"  # the one that is loaded


@pytest.mark.parametrize("address", ["ftp://host", "http://", "http://host:port"])
def test_a_wrong_address_is_refused(address: str) -> None:
    with pytest.raises(BadInput, match="not an address"):
        connect(address)


def test_chat(server: Server) -> None:
    with RemoteServer(server.url) as remote:
        answer = remote.chat(HELLO, "first", temperature=0, top_k=3, stop="x")
        assert (answer.text, answer.finish_reason) == ("Héllo", "length")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 5)
        chunks = list(remote.model("first").chat(HELLO, stream=True))
    assert [c.text for c in chunks] == ["Hé", "llo", ""]
    assert [c.usage is None for c in chunks] == [True, True, False]
    asked = server.seen[0]
    assert asked["messages"] == HELLO
    assert {k: asked[k] for k in ("model", "temperature", "top_k", "stop", "stream")} == {
        "model": "first",
        "temperature": 0,
        "top_k": 3,
        "stop": "x",
        "stream": True,
    }
    assert "seed" not in asked


def test_complete(server: Server) -> None:
    with RemoteServer(server.url) as remote:
        assert str(remote.model("first").complete("Once", max_tokens=5)) == "Héllo"
        assert [c.text for c in remote.model("first").generate([1, 2])] == ["Hé", "llo", ""]
        list(remote.model("first").generate("Once", Sampling(seed=3, stop=("x",))))
    assert [s["prompt"] for s in server.seen] == ["Once", [1, 2], "Once"]
    assert {"seed": 3, "stop": ["x"]}.items() <= server.seen[2].items()
    assert "top_k" not in server.seen[2]


def test_wrong_options_are_refused_before_any_request(server: Server) -> None:
    with RemoteServer(server.url) as remote, pytest.raises(BadInput, match="tempurature"):
        remote.model("first").chat(HELLO, tempurature=1)
    assert server.seen == []


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        ("missing", RemoteError, "Did you mean first"),
        ("locked", RemoteError, "ALIGHT_API_KEY"),
        ("plain", RemoteError, "oops"),
        ("fails", RemoteError, "the engine failed"),
        ("garbles", RemoteError, "not JSON"),
        ("dies", NetworkError, "hung up"),
    ],
)
def test_errors_of_the_server(server: Server, model: str, error: type[Exception], text: str) -> None:
    with RemoteServer(server.url) as remote, pytest.raises(error, match=text) as caught:
        remote.model(model).chat(HELLO)
    assert server.url in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_an_answer_that_is_no_list_of_models(server: Server) -> None:
    with RemoteServer(f"{server.url}/bare") as remote, pytest.raises(RemoteError, match="list of models"):
        remote.models()


def test_closing_the_stream_hangs_up(server: Server) -> None:
    with RemoteServer(server.url) as remote:
        stream = remote.chat(HELLO, "endless", stream=True)
        assert next(stream).text == "on "
        stream.close()
        assert server.hung_up.wait(10)
        assert remote.models()  # the connection pool is still good


def test_nobody_there(port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with RemoteServer(url) as remote:
        for ask in (remote.models, lambda: remote.chat(HELLO, "first")):
            with pytest.raises(NetworkError, match=url):
                ask()


def test_the_api_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGHT_API_KEY", "from-the-environment")
    for key in (None, "given", ""):
        with RemoteServer(server.url, api_key=key) as remote:
            remote.models()
    with api.connect(server.url, api_key="by the front door") as remote:
        remote.models()
    keys = ["Bearer from-the-environment", "Bearer given", None, "Bearer by the front door"]
    assert [s["key"] for s in server.seen] == keys


def test_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with RemoteServer(server.url) as remote:
        assert remote.models()


def test_our_own_server(name: str) -> None:
    from alight.server import Models, running
    from alight.testing import EchoModel

    with Models(None) as models:
        models.add("echo", EchoModel())
        with running(models, name=name, api_key="s3cret") as url:
            port = int(url.rpartition(":")[2])
            with announced(name, port), connect(name, timeout=10, api_key="s3cret") as remote:
                assert remote.models() == ["echo"]
                answer = remote.chat([{"role": "user", "content": "héllo"}], temperature=0)
                assert (answer.text, answer.finish_reason) == ("héllo", "stop")
                assert answer.usage.prompt_tokens == 6
                assert str(remote.model("echo").complete("abc", max_tokens=2)) == "ab"
                with pytest.raises(RemoteError, match="Did you mean echo"):
                    remote.chat(HELLO, "ecco")
            with RemoteServer(url) as stranger, pytest.raises(RemoteError, match="ALIGHT_API_KEY"):
                stranger.models()
