"""Talk to an alight server (or any server with OpenAI's API) as if its models were loaded here."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, overload

import httpx

from alight.chat import Message
from alight.errors import BadInput, NetworkError, RemoteError
from alight.target import Chunk, Completion, FinishReason, Sampling, Usage

if TYPE_CHECKING:
    from types import TracebackType

_CONNECT_SECONDS = 5.0
# Between two pieces of an answer. A small board may first have to load the model and read a long prompt.
_READ_SECONDS = 600.0


def connect(name: str, *, timeout: float = 2.0, api_key: str | None = None) -> RemoteServer:
    """A server on this network.

    Args:
        name: its name, as `discover` shows it, or its address: "http://host:port".
        timeout: seconds to look for a name.
        api_key: what the server asks for; by default `$ALIGHT_API_KEY`.

    Raises:
        DeviceNotFound: no server of that name; names those that were found.
        BadInput: an address that is not one.
    """
    if "://" in name:
        return RemoteServer(name, api_key=api_key)
    from alight.lan.discovery import find

    peer = find(name, timeout)
    return RemoteServer(peer.url, name=peer.name, api_key=api_key)


class RemoteServer:
    """A server and its models. Thread-safe; close it or use it in a `with` block.

    Args:
        url: "http://host:port". Nothing is sent before it is needed.
        name: what people call it; by default its host and port.
        api_key: what the server asks for; by default `$ALIGHT_API_KEY`.
    """

    def __init__(self, url: str, *, name: str = "", api_key: str | None = None) -> None:
        self.url = _checked(url)
        self.name = name or self.url.partition("://")[2]
        key = os.environ.get("ALIGHT_API_KEY") if api_key is None else api_key
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=False,  # a proxy of the environment does not reach this network
        )

    def models(self) -> list[str]:
        """The names of the models it offers.

        Raises:
            NetworkError: it cannot be reached. RemoteError: it answered with an error.
        """
        return [name for name, _ in self._models()]

    def model(self, name: str | None = None) -> RemoteModel:
        """One of its models; None takes one that is loaded, or else the first.

        Raises:
            RemoteError: it has none. NetworkError, RemoteError: as for `models`.
        """
        if name is None:
            models = self._models()
            if not models:
                raise RemoteError(
                    f"{self.name} offers no models", hint="Pull one there: `alight pull SOURCE`."
                )
            name = next((n for n, loaded in models if loaded), models[0][0])
        return RemoteModel(self, name)

    def loaded(self) -> list[dict[str, Any]]:
        """The models that it has in memory, and what they do: the JSON of `/alight/v1/models`.

        Raises:
            NetworkError, RemoteError: as for `models`.
        """
        with _network(self.url):
            response = self._http.get("/alight/v1/models", timeout=30)
        return list(_answer(self.url, response)["models"])

    def unload(self, model: str) -> bool:
        """Free a model's memory. False if it will be when its last request ends.

        Raises:
            RemoteError: it has no such model. NetworkError, RemoteError: as for `models`.
        """
        with _network(self.url):
            response = self._http.post("/alight/v1/unload", json={"model": model}, timeout=30)
        return bool(_answer(self.url, response)["unloaded"])

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: Sequence[Message], model: str | None = None, *, stream: Literal[True], **options: Any
    ) -> Generator[Chunk]: ...
    def chat(
        self, messages: Sequence[Message], model: str | None = None, *, stream: bool = False, **options: Any
    ) -> Completion | Generator[Chunk]:
        """Answer a conversation with one of its models (see `model`). Options are those of Sampling."""
        chosen = self.model(model)
        return chosen.chat(messages, stream=True, **options) if stream else chosen.chat(messages, **options)

    def close(self) -> None:
        """Close its connections. Safe to call twice."""
        self._http.close()

    def __enter__(self) -> RemoteServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteServer({self.name!r}, {self.url!r})"

    def _models(self) -> list[tuple[str, bool]]:
        """The name of each model, and whether it is loaded (which only alight's servers tell)."""
        with _network(self.url):
            response = self._http.get("/v1/models", timeout=30)
        if response.is_error:
            raise _refusal(self.url, response)
        try:
            return [(str(m["id"]), m.get("loaded") is True) for m in response.json()["data"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RemoteError(
                f"{self.url} answered without a list of models", hint="Is it an alight server?"
            ) from error

    def _stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """POST, and yield the JSON events of the answer. Closing the generator hangs up."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with _network(self.url), self._http.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise _refusal(self.url, response)
            for line in response.iter_lines():
                field, _, value = line.partition(":")
                if field != "data":
                    continue  # a comment that keeps the connection open, or a field we have no use for
                if value.strip() == "[DONE]":
                    return
                yield _event(self.url, value)
        raise NetworkError(f"{self.url} hung up in the middle of the answer", hint="Its log may tell why.")


class RemoteModel:
    """A model on a server. `chat`, `complete` and `generate` are those of a local Model."""

    def __init__(self, server: RemoteServer, name: str) -> None:
        self.server = server
        self.name = name

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> Generator[Chunk]: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Any
    ) -> Completion | Generator[Chunk]:
        """Answer a conversation, given as OpenAI-style messages. Options are those of Sampling; what is not
        given is left to the server. Closing the generator makes the server stop."""
        chunks = self._ask("/v1/chat/completions", {"messages": list(messages)}, options)
        return chunks if stream else Completion.of(chunks)

    def complete(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """Continue a prompt and return the whole answer. Options are those of Sampling."""
        return Completion.of(self._continue(prompt, options))

    def generate(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generator[Chunk]:
        """Continue a prompt, as a stream."""
        given = [f for f in fields(Sampling) if sampling and getattr(sampling, f.name) != f.default]
        return self._continue(prompt, {f.name: getattr(sampling, f.name) for f in given})

    def _continue(self, prompt: str | Sequence[int], options: dict[str, Any]) -> Generator[Chunk]:
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        return self._ask("/v1/completions", {"prompt": prompt}, options)

    def _ask(self, path: str, body: dict[str, Any], options: dict[str, Any]) -> Generator[Chunk]:
        Sampling.of(**options)  # a wrong option is an error before any request, as with a local model
        given = {name: value for name, value in options.items() if value is not None}
        return _chunks(self.server._stream(path, {"model": self.name, **body, **given}))

    def __repr__(self) -> str:
        return f"RemoteModel({self.name!r} on {self.server.name!r})"


def _chunks(events: Generator[dict[str, Any]]) -> Generator[Chunk]:
    """OpenAI's stream as ours: the last chunk has the reason and the usage, which there come apart."""
    started, first = time.monotonic(), 0.0
    reason: FinishReason = "stop"
    told: dict[str, Any] = {}
    pieces = 0
    try:
        for event in events:
            told = event.get("usage") or told
            for choice in event.get("choices") or []:
                text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                reason = "length" if choice.get("finish_reason") == "length" else reason
                if text:
                    first = first or time.monotonic()
                    pieces += 1
                    yield Chunk(text=text)
    finally:
        events.close()  # now, not when it is collected: the server goes on generating until we hang up
    ended = time.monotonic()
    first = first or ended
    usage = Usage(
        prompt_tokens=int(told.get("prompt_tokens") or 0),
        completion_tokens=int(told.get("completion_tokens") or pieces),
        prompt_seconds=first - started,
        decode_seconds=ended - first,
    )
    yield Chunk(finish_reason=reason, usage=usage)


def _event(url: str, text: str) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except ValueError as error:
        raise RemoteError(f"{url} sent an event that is not JSON: {text[:80]!r}") from error
    if not isinstance(event, dict):
        raise RemoteError(f"{url} sent an event that is not an object: {text[:80]!r}")
    if "error" in event:
        raise RemoteError(f"{url}: {_message(event)}")
    return event


def _answer(url: str, response: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer of alight's own API."""
    if response.is_error:
        raise _refusal(url, response)
    try:
        return dict(response.json())
    except ValueError as error:
        raise RemoteError(f"{url} answered without JSON", hint="Is it an alight server?") from error


def _refusal(url: str, response: httpx.Response) -> RemoteError:
    """The error that a server answered with, in its own words."""
    try:
        message = _message(response.json())
    except ValueError:
        message = _message(response.text[:200] or response.reason_phrase)
    hint = ""
    if response.status_code in (401, 403):
        hint = "Set ALIGHT_API_KEY to the key that the server was started with."
    return RemoteError(f"{url}: {message} (status {response.status_code})", hint=hint)


def _message(body: Any) -> str:
    """The text in {"error": {"message": …}} (OpenAI), {"error": …} (Ollama) or {"detail": …} (FastAPI)."""
    if isinstance(body, dict):
        body = body.get("error") or body.get("detail") or body
    if isinstance(body, dict):
        body = body.get("message") or body
    text = body if isinstance(body, str) else json.dumps(body)
    return "".join(c for c in text if c.isprintable() or c == "\n")[:1000]


@contextmanager
def _network(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError as error:
        raise NetworkError(
            f"cannot reach {url}: {error}", hint="Is `alight serve` running there, and on that port?"
        ) from error
    except httpx.TimeoutException as error:
        raise NetworkError(
            f"{url} does not answer: {type(error).__name__}", hint="Is the device still on?"
        ) from error
    except httpx.HTTPError as error:
        raise NetworkError(f"the connection to {url} broke: {error or type(error).__name__}") from error


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise BadInput(f"{url!r} is not an address: {error}", hint=_FORM) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise BadInput(f"{url!r} is not an address", hint=_FORM)
    return str(parsed.copy_with(query=None, fragment=None)).rstrip("/")


_FORM = "Give a device's name, or an address such as http://192.168.1.20:11435."

__all__ = ["RemoteModel", "RemoteServer", "connect"]
