"""The servers under test: alight, llama-server and vLLM, each started on loopback and stopped again."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from peer import BENCH
from serving_client import Client, ServerFailed

STARTING = 600.0  # seconds; vLLM takes its time
_OPENER = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # never through a proxy: it is loopback


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a server.

    Attributes:
        engine: "alight", "llama-server" or "vllm".
        label: what tells this setting from the engine's others; "" where there is one.
        command: the whole command line, without the port.
        environment: on top of ours.
    """

    engine: str
    label: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """The command as it can be told: with file names instead of paths of this machine."""
        shown = (Path(word).name if "/" in word else word for word in self.command)
        return " ".join([*(f"{k}={v}" for k, v in self.environment if "/" not in v), *shown])


@dataclass(slots=True)
class Server:
    """A server that runs."""

    process: subprocess.Popen[bytes]
    url: str
    client: Client

    def memory(self) -> int:
        """Resident bytes of the process and those it started. Pages they share count each time."""
        first = psutil.Process(self.process.pid)
        total = 0
        for process in [first, *first.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def metrics(self) -> dict[str, float]:
        """What alight counts itself, at /metrics, summed over labels. Empty for other servers."""
        found: dict[str, float] = {}
        try:
            lines = _get(f"{self.url}/metrics").decode().splitlines()
        except OSError:
            return found
        for line in lines:
            match = re.match(r"(alight_\w+)(?:\{.*\})? ([-+.\deE]+)$", line)
            if match and not match[1].endswith(("_bucket", "_created")):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found


@contextmanager
def running(setting: Setting) -> Iterator[Server]:
    """The server, ready to answer, until the block ends. What it says goes to a log file."""
    port = _free_port()
    environment = {**os.environ, "ALIGHT_HOME": str(BENCH / "home"), **dict(setting.environment)}
    BENCH.mkdir(exist_ok=True)
    log = BENCH / f"{setting.engine}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*setting.command, "--port", str(port)], stdout=out, stderr=out, env=environment
        )
    try:
        url = f"http://127.0.0.1:{port}"
        yield Server(process, url, Client(url, _wait_for_model(url, process, log)))
    finally:
        _stop(process)


def alight(model: Path, *, threads: int, slots: int, context: int) -> Setting:
    """`alight serve`. One setting for all work: its engine is to adapt, not its user."""
    command = [sys.executable, "-m", "alight", "serve", str(model), "--no-advertise"]
    options = ["--threads", str(threads), "--slots", str(slots), "--context", str(context)]
    return Setting("alight", "", (*command, *options))


def llama_server(
    binary: Path, model: Path, label: str, options: Sequence[str], *, threads: int, slots: int, context: int
) -> Setting:
    """`llama-server`. Its RAM cache of idle slots is off: here it would only copy what is never used again."""
    command = [str(binary), "-m", str(model), "-t", str(threads), "-np", str(slots), "-c", str(context)]
    return Setting("llama-server", label, (*command, "--cache-ram", "0", *options))


def vllm(python: Path, checkpoint: Path, *, threads: int) -> Setting:
    """vLLM on the CPU, for a Hugging Face checkpoint (it reads no GGUF there)."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    options = ["--dtype", "bfloat16", "--max-model-len", "1024", "--served-model-name", "bench"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Setting("vllm", "", (*command, *options), tuple(environment.items()))


def _wait_for_model(url: str, process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server answers, and give its name of the model."""
    deadline = time.monotonic() + STARTING
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = log.read_text(errors="replace")[-2000:]
            raise ServerFailed(f"{log.stem} ended with code {process.returncode}:\n{tail}")
        try:
            _get(f"{url}/health")
            name: str = json.loads(_get(f"{url}/v1/models"))["data"][0]["id"]
            return name
        except OSError:
            time.sleep(0.1)
    raise ServerFailed(f"{log.stem} did not answer within {STARTING:.0f} s")


def _get(url: str) -> bytes:
    with _OPENER.open(url, timeout=10) as response:
        data: bytes = response.read()
        return data


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _stop(process: subprocess.Popen[bytes]) -> None:
    tree = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in tree:  # a worker that outlived its server would disturb what is measured next
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
