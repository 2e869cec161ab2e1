"""alight demo: the whole job once, on real weights."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.rule import Rule
from rich.text import Text

from alight import api, devices
from alight.artifact import Artifact
from alight.cli.build import print_result
from alight.cli.describe import one_line
from alight.cli.output import console, err, human_bytes, progress
from alight.store import Store

if TYPE_CHECKING:
    from alight.lan.discovery import Peer

SOURCE = "builtin:smollm2"
NAME = "smollm2:demo"
QUESTION = "Give me three tips for a good night's sleep."


def command(
    keep: Annotated[bool, typer.Option("--keep", help="Keep serving until Ctrl-C.")] = False,
) -> None:
    """Do the main job once: probe, pull, build, serve, find, ask.

    It uses SmolLM2-135M-Instruct, which the demo extra installs; nothing is downloaded.

    Example: alight demo --keep
    """
    artifact = _build()
    from alight.lan.discovery import advertise, find
    from alight.server.manager import Models
    from alight.server.run import running

    _step("Serve it, and find it by mDNS")
    with Models(Store()) as models, running(models, name="alight-demo") as url:
        port = int(url.rsplit(":", 1)[1])
        with advertise("alight-demo", port, host="127.0.0.1") as announced:
            started = time.perf_counter()
            peer = find(announced.name, timeout=10)
            console.print(Text(f"{peer.name} at {peer.url}, found in {time.perf_counter() - started:.2f} s"))
            _step("Ask it through the OpenAI API")
            _ask(peer, artifact.name)
            _step("Use it")
            _invite(url, artifact.name)
            if keep:
                err.print("Serving until Ctrl-C.")
                _wait()


def _build() -> Artifact:
    _step("Probe this device")
    device = devices.probe()
    console.print(
        Text(
            f"{device.name}: {device.cores} cores, {human_bytes(device.available_bytes)} free, "
            f"memory {device.bandwidth / 1e9:.0f} GB/s, int8 {device.int8_ops / 1e9:.0f} Gop/s"
        ),
        soft_wrap=True,
    )
    _step(f"Import {SOURCE}")
    with progress() as report:
        source = api.resolve(SOURCE, progress=report)
    console.print(Text(one_line(source)))
    _step("Build the GGUF that fits this device")
    builder, request = api.prepare_build(source.name, device=device, name=NAME, format="gguf", tokens=1024)
    with progress(steps=True) as report:
        result = builder.build(request, report)
    print_result(result, request)
    return result.artifact


def _ask(peer: Peer, model: str) -> None:
    from alight.lan.client import connect

    console.print(Text(f"> {QUESTION}"), style="cyan")
    with connect(peer.url) as server:
        chunks = server.chat(
            [{"role": "user", "content": QUESTION}], model=model, stream=True, temperature=0, max_tokens=96
        )
        started, first, tokens = time.perf_counter(), 0.0, 0
        for chunk in chunks:
            first = first or time.perf_counter()
            print(chunk.text, end="", flush=True)
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
        ended = time.perf_counter()
    print()
    speed = (tokens - 1) / (ended - first) if tokens > 1 else 0.0
    console.print(
        Text(f"{tokens} tokens, first after {first - started:.2f} s, then {speed:.1f} tokens/s"), style="dim"
    )


def _invite(url: str, model: str) -> None:
    import segno

    console.print(Text(f"{url}/v1  (OpenAI)    {url}  (Ollama)    model: {model}"), soft_wrap=True)
    segno.make(url, micro=False).terminal(sys.stdout, compact=True)
    console.print("Next: alight run smollm2:demo    alight serve --host 0.0.0.0")


def _wait() -> None:
    while True:
        time.sleep(3600)


def _step(what: str) -> None:
    console.print()
    console.print(Rule(what, align="left", style="dim"))
