"""Run the server: in the foreground until a signal ends it, or in a thread while a `with` block lasts."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import uvicorn

from alight.errors import AlightError, BadInput, EngineError
from alight.server.app import create_app
from alight.server.manager import Models

log = logging.getLogger(__name__)

_GRACE = 3  # seconds that requests which are no answers (those are cancelled at once) get at shutdown


def serve(
    models: Models,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    name: str = "alight",
    api_key: str | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM (the second SIGINT does not wait for anything). The models stay open.

    Args:
        host: the address to listen on; "0.0.0.0" is every IPv4 network, "::" every IPv6 one.
        port: 0 takes a free one.
        name: what the server calls itself.
        api_key: required as a bearer token where given.
        ready: called with the server's URL once it answers.

    Raises:
        AlightError: the port is in use or not permitted, or the host is not an address of this machine.
    """
    with closing(_listen(host, port)) as listener:
        server = _Server(models, listener, name, api_key, ready)
        with server.stopped_by_signals():
            server.run(sockets=[listener])


@contextmanager
def running(
    models: Models,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    name: str = "alight",
    api_key: str | None = None,
) -> Iterator[str]:
    """Serve in a thread while the block lasts; gives the server's URL. Arguments are those of `serve`."""
    with closing(_listen(host, port)) as listener:
        started = threading.Event()
        server = _Server(models, listener, name, api_key, lambda _: started.set())
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="alight-server", daemon=True
        )
        thread.start()
        try:
            while not started.wait(0.05):
                if not thread.is_alive():
                    raise EngineError("the server did not start", hint="The log says why.")
            yield _url(listener)
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            if thread.is_alive():
                log.warning("the server is still shutting down")


class _Server(uvicorn.Server):
    """uvicorn on a socket of ours; at shutdown it cancels the answers in progress."""

    def __init__(
        self,
        models: Models,
        listener: socket.socket,
        name: str,
        api_key: str | None,
        ready: Callable[[str], None] | None,
    ) -> None:
        app = create_app(models, name=name, api_key=api_key)
        # Logging is the application's to configure, and guard.AccessLog writes the access log.
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE, ws="none"
            )
        )
        self._answers = app.state.answers
        self._listener = listener
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._ready:
            self._ready(_url(self._listener))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._answers.stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again when it has shut down, which would end the process before the
        # models are closed. Ours is stopped_by_signals.
        yield

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may take signals: whoever has it stops us
            return
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Bound here and not by uvicorn, which ends the process when it cannot."""
    if not 0 <= port <= 65535:
        raise BadInput(f"port is {port}", hint="It must be between 0 (a free one) and 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise BadInput(
            f"host {host!r} is not an address: {error}", hint="Use --host 127.0.0.1 or 0.0.0.0."
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        if hasattr(signal, "SIGHUP"):  # POSIX; on Windows this option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            hint = (
                "Another server runs there: stop it, or choose another one with --port (0 takes a free one)."
            )
            raise AlightError(f"port {port} of {host} is in use", hint=hint) from error
        if error.errno == errno.EACCES:
            raise AlightError(
                f"port {port} is not permitted", hint="Choose one above 1023 with --port."
            ) from error
        raise AlightError(
            f"cannot listen on {host} port {port}: {error.strerror}", hint="Check --host."
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    """Where this machine reaches the server."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
