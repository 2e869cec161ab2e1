"""A streaming client for OpenAI completions that costs little processor time, for measurements.

The server under test and this client share few cores, so each piece of an answer has to be cheap to read:
plain asyncio streams, HTTP/1.1 with chunked bodies (which every server here sends), one JSON parse per event.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 600.0  # seconds that one request may take


class ServerFailed(Exception):
    """The server answered with an error, or not at all."""


@dataclass(slots=True)
class Stream:
    """One answer as the client saw it. Times are of `time.perf_counter`."""

    sent: float
    pieces: list[float] = field(default_factory=list)  # when each piece of text came
    text: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0  # generated, as the server counts them

    @property
    def first(self) -> float:
        """Seconds to the first piece of text."""
        return self.pieces[0] - self.sent

    @property
    def ended(self) -> float:
        return self.pieces[-1]

    @property
    def decode(self) -> float:
        """Tokens per second after the first one."""
        return (self.tokens - 1) / (self.ended - self.pieces[0])

    def gaps(self, since: float, until: float) -> list[float]:
        """The waits for a piece of text that overlap a span of time."""
        pairs = zip(self.pieces, self.pieces[1:], strict=False)
        return [b - a for a, b in pairs if b > since and a < until]


class Client:
    """Sends requests to one server.

    Args:
        url: the server's, without a path.
        model: the name that it knows the model by.
    """

    def __init__(self, url: str, model: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.model = model

    async def complete(self, prompt: str, tokens: int, stream: Stream | None = None) -> Stream:
        """Continue a text by exactly `tokens` tokens. `stream` can be watched while it fills."""
        return await self._send("/v1/completions", {"prompt": prompt}, tokens, stream)

    async def chat(self, system: str, user: str, tokens: int) -> Stream:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return await self._send("/v1/chat/completions", {"messages": messages}, tokens, None)

    async def _send(self, path: str, body: dict[str, Any], tokens: int, stream: Stream | None) -> Stream:
        body = body | {
            "model": self.model,
            "max_tokens": tokens,
            "temperature": 0,
            "top_k": 1,  # says the same; spares servers that sort the vocabulary first
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        stream = stream or new_stream()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._exchange(_request(path, self.host, body), stream)
        except TimeoutError:
            raise ServerFailed(f"no whole answer within {PATIENCE:.0f} s") from None
        if stream.tokens != tokens:
            raise ServerFailed(f"asked for {tokens} tokens, the server says it made {stream.tokens}")
        return stream

    async def _exchange(self, request: bytes, stream: Stream) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request)
            await _read_answer(reader, stream)
        finally:
            writer.close()


def new_stream() -> Stream:
    return Stream(sent=time.perf_counter())


def _request(path: str, host: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


async def _read_answer(reader: asyncio.StreamReader, stream: Stream) -> None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in head.split(b"\r\n", 1)[0] or b"transfer-encoding: chunked" not in head:
            raise ServerFailed((head + await reader.read(2000)).decode(errors="replace"))
        await _read_events(reader, lambda event: _note(event, stream))
    except (EOFError, OSError) as error:
        raise ServerFailed(f"the connection broke off: {error!r}") from error


async def _read_events(reader: asyncio.StreamReader, on_event: Callable[[bytes], None]) -> None:
    """Server-sent events in a chunked body, up to [DONE]."""
    rest = b""
    while True:
        size = int((await reader.readline()).split(b";")[0] or b"0", 16)
        if size == 0:
            raise EOFError("the answer ended without [DONE]")
        rest += (await reader.readexactly(size + 2))[:-2]
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                on_event(line[6:])


def _note(event: bytes, stream: Stream) -> None:
    data = json.loads(event)
    if "error" in data:
        raise ServerFailed(str(data["error"]))
    for choice in data["choices"]:
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        if text:
            stream.pieces.append(time.perf_counter())
            stream.text.append(text)
    if usage := data.get("usage"):
        stream.prompt_tokens = usage["prompt_tokens"]
        stream.tokens = usage["completion_tokens"]
