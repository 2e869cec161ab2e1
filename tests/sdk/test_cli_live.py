"""`alight serve` with signals and clients, and `alight run` in a terminal."""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_writer import tiny
from test_cli_support import COMMAND, LIMIT, Serving, Terminal, environment, fails, ok

from alight.errors import RemoteError
from alight.lan.client import RemoteServer, connect
from alight.lan.discovery import find
from alight.store import Store

HELLO = [{"role": "user", "content": "hello"}]
QUIET = "--no-advertise"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "loose.gguf"
    path.write_bytes(tiny())
    return path


@pytest.fixture
def pulled(file: Path) -> str:
    ok("pull", file, "--name", "tiny")
    return "tiny"


# -- serve -----------------------------------------------------------------------------------------


def test_serve_everything(pulled: str, file: Path) -> None:
    with Serving("--target", "echo", QUIET) as server, RemoteServer(server.url) as remote:
        assert remote.models() == ["tiny"]
        assert str(remote.chat(HELLO)) == "hello"
        ok("pull", file, "--name", "later")
        assert remote.models() == ["later", "tiny"]
        code, out, errors = server.stop()
    assert code == 0
    assert "tiny: 64 parameters" in out
    assert errors.endswith("stopped\n")
    assert "Traceback" not in errors


def test_serve_only_what_is_named(pulled: str, file: Path) -> None:
    ok("pull", file, "--name", "secret")
    with Serving("tiny", file, "--target", "echo", QUIET) as server, RemoteServer(server.url) as remote:
        assert remote.models() == ["loose", "tiny"]
        assert str(remote.chat(HELLO, "loose")) == "hello"
        with pytest.raises(RemoteError, match="no model named 'secret'"):
            remote.chat(HELLO, "secret")


def test_serve_with_a_key(pulled: str) -> None:
    with Serving("--target", "echo", "--api-key", "s3cret", QUIET) as server:
        with RemoteServer(server.url, api_key="wrong") as stranger, pytest.raises(RemoteError, match="401"):
            stranger.models()
        with RemoteServer(server.url, api_key="s3cret") as friend:
            assert friend.models() == ["tiny"]
    with (
        Serving("--target", "echo", QUIET, ALIGHT_API_KEY="other") as server,
        RemoteServer(server.url, api_key="other") as friend,
    ):
        assert friend.models() == ["tiny"]


def test_serve_to_the_network_warns_without_a_key(pulled: str) -> None:
    with Serving("--host", "0.0.0.0", QUIET) as server:
        _, _, errors = server.stop(signal.SIGTERM)
    assert "anyone on this network can use it" in errors
    with Serving("--host", "0.0.0.0", "--api-key", "k", QUIET) as server:
        _, _, errors = server.stop(signal.SIGTERM)
    assert "anyone" not in errors


def test_serve_is_found_by_name_and_says_goodbye(pulled: str) -> None:
    name = f"Test-{secrets.token_hex(4)}"
    with Serving("--target", "echo", "--name", name) as server:
        with connect(name, timeout=30) as remote:
            assert remote.url == server.url
            assert len(find(name, 30).properties["models"]) == 16
            assert str(remote.chat(HELLO)) == "hello"
        code, _, errors = server.stop()
    assert code == 0
    assert f"Announced as {name}." in errors


def test_serve_on_a_port_in_use(pulled: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in fails("serve", "--port", str(port), QUIET)


def test_serve_what_is_there_when_the_store_is_empty(smollm2_file: Path) -> None:
    with Serving(QUIET) as server, RemoteServer(server.url) as remote:
        assert remote.models() == ["smollm2"]
    assert Store().names() == ["smollm2:latest"]


def test_the_port_is_free_after_ctrl_c(pulled: str) -> None:
    with Serving(QUIET) as server:
        port = server.url.rpartition(":")[2]
        assert server.stop()[0] == 0
    with Serving("--port", port, QUIET) as again:
        assert again.url.endswith(port)


def test_serve_shows_a_code_for_phones_in_a_terminal(pulled: str) -> None:
    with Terminal("serve", "--port", "0", "--host", "0.0.0.0", "--api-key", "k", QUIET) as terminal:
        terminal.read_until("alight serves at http://")
        terminal.read_until("██")
        terminal.send("\x03")
        terminal.read_until("stopped")
        assert terminal.end() == 0


# -- run in a terminal -----------------------------------------------------------------------------


@pytest.fixture
def chat(pulled: str) -> Iterator[Terminal]:
    with Terminal("run", pulled, "--target", "echo") as terminal:
        terminal.read_until(">>>")
        yield terminal


def say(terminal: Terminal, text: str) -> str:
    """Type a line; gives what was shown until the next prompt."""
    terminal.send(text + "\r")
    terminal.read_until("\n")
    return terminal.read_until(">>>")


def test_a_chat(chat: Terminal, home: Path) -> None:
    answer = say(chat, "hello there")
    assert "hello there" in answer
    assert "tok/s" in answer
    shown = say(chat, "/show")
    assert "messages" in shown
    assert "2" in shown.split("messages")[1].splitlines()[0]
    assert "forgotten" in say(chat, "/clear")
    assert "0" in say(chat, "/show").split("messages")[1].splitlines()[0]
    chat.send("/exit\r")
    assert chat.end() == 0
    assert "+hello there" in (home / "history").read_text()
    assert (home / "history").stat().st_mode & 0o077 == 0


def test_commands(chat: Terminal) -> None:
    assert "/clear" in say(chat, "/help")
    assert "Did you mean /clear" in say(chat, "/claer")
    assert "lists the commands" in say(chat, "/xyzzy")
    assert "max_tokens = 3" in say(chat, "/set max_tokens 3")
    assert "abc\r\n" in say(chat, "abcdef")
    assert "max_tokens = None" in say(chat, "/set max_tokens")
    assert "must be a whole number" in say(chat, "/set seed 1.5")
    assert "between 0 and 100" in say(chat, "/set temperature 500")
    assert "Known: max_tokens" in say(chat, "/set temprature 1")
    assert "set" in say(chat, "/system Be brief.")
    assert "Be brief." in say(chat, "/show")


def test_several_lines(chat: Terminal) -> None:
    chat.send('"""first\r')
    chat.read_until("...")
    assert "first\r\nsecond\r\n" in say(chat, 'second"""')
    chat.send("one\x1b\r")
    chat.read_until("...")
    assert "one\r\ntwo\r\n" in say(chat, "two")


def test_ctrl_c_clears_the_line_and_ctrl_d_leaves(chat: Terminal) -> None:
    chat.send("nonsense")
    chat.read_until("nonsense")
    chat.send("\x03")
    chat.read_until("\n")
    chat.read_until(">>>")
    assert "word" in say(chat, "word")
    chat.send("\x04")
    assert chat.end() == 0


def test_a_context_that_is_full_does_not_end_the_chat(pulled: str) -> None:
    with Terminal("run", pulled, "--target", "echo", "--context", "8") as terminal:
        terminal.read_until(">>>")
        assert "the context holds 8" in say(terminal, "a long sentence")
        assert "hi\r\n" in say(terminal, "hi")


def test_ctrl_c_stops_the_answer_and_not_the_chat(smollm2_file: Path) -> None:
    with Terminal("run", smollm2_file, "--context", "2048", "--temperature", "0") as terminal:
        terminal.read_until(">>>")
        terminal.send("Write a very long story about the sea.\r")
        terminal.read_until("\n")
        terminal.read_until("the ")  # of the answer: what is typed earlier belongs to the next prompt
        terminal.send("\x03")
        terminal.read_until("(stopped)")
        terminal.read_until(">>>")
        say(terminal, "/set max_tokens 4")
        assert "tok/s" in say(terminal, "Hello.")
        terminal.send("\x04")
        assert terminal.end() == 0


def test_ctrl_c_ends_a_single_answer(smollm2_file: Path) -> None:
    command = [*COMMAND, "run", str(smollm2_file), "Write a very long story.", "--context", "2048"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert errors == b"interrupted\n"


def test_a_terminal_gets_no_escape_sequences_from_a_model(pulled: str) -> None:
    with Terminal("run", pulled, "\x1b]0;title\x07ok", "--target", "echo") as terminal:
        terminal.end()
        assert "\x1b]0" not in terminal.seen
        assert "\ufffd]0;title\ufffdok" in terminal.seen
