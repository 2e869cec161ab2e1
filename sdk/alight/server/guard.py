"""What every request passes on its way in: the access log, and the checks of who asks.

Plain ASGI middleware: Starlette's BaseHTTPMiddleware would hide from an answer that its client hung up.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alight.server.failures import Refused, respond

access = logging.getLogger("alight.server.access")

OPEN_PATHS = ("/", "/health")


class AccessLog:
    """One line for each request, and one count. Never its content, and not the query either.

    Args:
        count: is told the method, the route (as it was declared; empty if there is none) and the status.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, str, int], None]) -> None:
        self.app = app
        self.count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 500  # what uvicorn answers when the application fails

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            client = scope["client"][0] if scope.get("client") else "-"
            path = scope.get("raw_path", b"").decode(
                "latin-1"
            )  # still percent-encoded: one line stays one line
            seconds = time.monotonic() - started
            access.info("%s %s %s %d %.3fs", client, scope["method"], path, status, seconds)
            self.count(scope["method"], _route(scope), status)


def _route(scope: Scope) -> str:
    """The route of a request as it was declared, "/v1/models/{name}": there are few of those. Empty without one."""
    route = scope.get("route")
    if route is None:
        return ""
    # The route knows its path inside its router only. What stands before that is the router's prefix.
    inside: str = route.path_format.format(**scope["path_params"])
    path: str = scope["path"]
    prefix = path.removesuffix(inside) if path.endswith(inside) else ""
    return prefix + str(route.path_format)


class Guard:
    """Refuses requests from other web sites, and those without the API key where there is one.

    A web page can send a simple POST anywhere without asking (CORS only keeps it from reading the answer),
    so a browser's request must come from a page of this very server.
    """

    def __init__(self, app: ASGIApp, api_key: str | None = None) -> None:
        self.app = app
        self.api_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal:
            await respond(scope["path"], refusal)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return Refused(403, f"requests from {origin} are not allowed", code="foreign_origin")
        if self.api_key and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            hint = "Send it as `Authorization: Bearer KEY`."
            return Refused(401, "this server wants an API key", hint=hint, code="invalid_api_key")
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        assert self.api_key is not None
        # Headers are bytes that Starlette reads as latin-1.
        return scheme.lower() == "bearer" and secrets.compare_digest(
            key.strip().encode("latin-1"), self.api_key
        )
