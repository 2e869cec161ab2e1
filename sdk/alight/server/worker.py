"""The process of one loaded model: `python -m alight.server.worker`, started by `WorkerModel`.

It talks to the server over its standard input and output (see worker_protocol), and begins each request in
a thread of its own; an engine that pushes its answers needs that no longer then. Whatever else writes to
standard output or error ends up in the server's log. It ends when its input does: when the server closes the
model, or dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from alight import api
from alight.errors import AlightError, EngineError
from alight.server import worker_protocol as protocol
from alight.server.watchdog import BEAT
from alight.server.worker_protocol import Channel
from alight.server.worker_streams import Streams
from alight.target import Chunk, LoadOptions, Model, Sampling

log = logging.getLogger(__name__)

_CLOSING = 5.0  # seconds that the engine gets to close
_BROKEN = 70  # exit code of a process whose engine cannot go on (EX_SOFTWARE)
_PR_SET_PDEATHSIG = 1


class Worker:
    """One model and the requests that run on it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._model: Model | None = None
        self._streams = Streams(channel)
        self._closing = False
        self._calls: set[int] = set()  # the other requests that the model works on
        self._wake = threading.Event()  # there is something to do

    def serve(self) -> None:
        """Answer requests until the server hangs up, then close the model."""
        self._start(self._beat)
        while frame := self._channel.receive():
            request, payload = frame
            match request["call"]:
                case "cancel":
                    self._streams.cancel(request["id"])
                case "generate":
                    self._streams.begin(request["id"], partial(self._generate, request, payload))
                    self._wake.set()
                case _:
                    self._start(self._answer, request)
        self._closing = True
        # Closing may get stuck in native code, and nobody is left then to end this process.
        limit = threading.Timer(_CLOSING, os._exit, (1,))
        limit.daemon = True
        limit.start()
        self._streams.cancel_all()
        if self._model:
            self._model.close()

    def _start(self, run: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=run, args=arguments, daemon=True).start()

    def _beat(self) -> None:
        """Tell the server every second how far the engine is, as long as there is something to do."""
        while self._wake.wait():
            self._wake.clear()  # first: what comes from here on sets it again
            if self._calls or self._streams:
                self._wake.set()
            busy = bool(self._calls or self._streams)
            if self._model and not self._model.alive and not self._closing:
                log.error("the engine cannot go on")
                os._exit(_BROKEN)  # the server starts another process
            progress = self._model.progress() if self._model else None
            told = {"id": protocol.BEAT, "progress": progress, "busy": busy and progress is not None}
            with contextlib.suppress(OSError):
                self._channel.send(told)
            time.sleep(BEAT)

    # -- in a request's thread -------------------------------------------------------------------

    def _answer(self, request: Mapping[str, Any]) -> None:
        number, call = request["id"], request["call"]
        try:
            if call == "load":
                header, payload = self._load(request), b""
            elif call in protocol.CALLS:
                self._calls.add(number)
                self._wake.set()
                result = getattr(self._loaded(), call)(*request["arguments"], **request["options"])
                header, payload = protocol.result_to_json(result)
            else:
                raise EngineError(f"the worker got a call {call!r}")
            self._channel.send({"id": number, **header}, payload)
        except Exception as error:
            self._fail(number, error)
        finally:
            self._calls.discard(number)

    def _generate(self, request: Mapping[str, Any], payload: bytearray) -> Generator[Chunk]:
        sampling = protocol.options_from_json(Sampling, request["sampling"])
        prompt = protocol.prompt_from_json(request["prompt"], payload)
        return self._loaded().generate(prompt, sampling)

    def _fail(self, number: int, error: Exception) -> None:
        if not isinstance(error, AlightError):
            log.error("a request failed", exc_info=error)
        with contextlib.suppress(OSError):  # the server is gone, and so are we in a moment
            self._channel.send({"id": number, "error": protocol.error_to_json(error)})

    def _loaded(self) -> Model:
        if self._model is None:
            raise EngineError("the worker has no model yet")
        return self._model

    def _load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        artifact = protocol.artifact_from_json(request["artifact"])
        options = protocol.options_from_json(LoadOptions, request["options"])
        model = self._model = api.load_artifact(artifact, options, target=request["target"])
        return {
            "info": protocol.info_to_json(model.info),
            "template": protocol.template_to_json(model.template),
        }


class _LogToServer(logging.Handler):
    """Log records go to the server, which logs them under the same name and level."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            text = self.format(record)
            self._channel.send(
                {"id": protocol.LOG, "level": record.levelno, "name": record.name, "text": text}
            )


def main() -> None:
    """Serve one model until standard input ends."""
    server = int(sys.argv[1])
    _end_with(server)
    # Ctrl-C in a terminal, and systemd when it stops a unit, signal every process. The server decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _be_the_first_to_go()
    channel = Channel(*_take_pipes())
    faulthandler.enable()
    logging.basicConfig(handlers=[_LogToServer(channel)], format="%(message)s", level=logging.WARNING)
    logging.getLogger("alight").setLevel(int(sys.argv[2]))
    Worker(channel).serve()
    os._exit(0)  # without waiting for the threads of requests that nobody wants any more


def _take_pipes() -> tuple[int, int]:
    """Our standard input and output as private descriptors. What others print goes to standard error."""
    incoming, outgoing = os.dup(0), os.dup(1)  # not inherited by processes that the engine starts
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return incoming, outgoing


def _end_with(server: int) -> None:
    """Have the kernel end us when the server dies, should our own thread for that be stuck."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if hasattr(os, "getppid") and os.getppid() != server:  # it died before that
        os._exit(1)


def _be_the_first_to_go() -> None:
    """When memory runs out, the kernel shall take this process and not the server."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


if __name__ == "__main__":
    main()
