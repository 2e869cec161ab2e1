"""HTTP as both hubs need it: bounded retries, and errors that name the host and say what to do.

One client (httpx) for both hubs, also for Hugging Face's API: huggingface_hub 1.x raises httpx's errors and
2.x those of httpx2, so going through it would mean two sets of network errors here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from alight.errors import BadInput, NetworkError, SourceError

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0)
"""Seconds between the tries of one request; when they are used up, it has failed."""

_LONGEST_RETRY_AFTER = 60.0
_BUSY = {408, 425, 429, 500, 502, 503, 504}


class Transient(Exception):
    """A failure that the next try may not meet."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class HubClient:
    """An HTTP client of one hub.

    Args:
        endpoint: the hub's address, such as "https://huggingface.co".
        endpoint_variable: the environment variable that sets it.
        token_variable: the environment variable that holds the user's token.
        headers: what identifies the user, sent to the hub's own host only.

    Raises:
        BadInput: the endpoint is no http:// or https:// address.
    """

    def __init__(
        self, *, endpoint: str, endpoint_variable: str, token_variable: str, headers: dict[str, str]
    ) -> None:
        import httpx

        if not _is_web_address(endpoint):
            raise BadInput(
                f"{endpoint_variable}={endpoint!r} is no address",
                hint="Give it as https://host[:port][/path].",
            )
        self.endpoint = endpoint.rstrip("/")
        self.endpoint_variable = endpoint_variable
        self.token_variable = token_variable
        self._headers = headers
        # On a redirect to another host (the hub's file storage) httpx drops Authorization and Cookie.
        self._http = httpx.Client(
            follow_redirects=True,
            timeout=httpx.Timeout(30.0, connect=10.0),
            headers={"User-Agent": "alight"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def json(self, path: str, params: dict[str, str], what: str) -> dict[str, Any]:
        """The JSON object at `path`.

        Raises:
            NetworkError: the hub cannot be reached, or kept failing.
            SourceError: it refused, has no such thing, or did not answer with a JSON object.
        """
        retries = self.retries()
        body: bytes | None = None
        while body is None:
            try:
                with self.get(self.endpoint + path, params=params) as response:
                    self.check(response, what)
                    body = response.read()
            except Transient as error:
                retries.failed(error)
        with contextlib.suppress(ValueError):
            answer = json.loads(body)
            if isinstance(answer, dict):
                return answer
        raise SourceError(
            f"{self.host} did not answer as a model hub does",
            hint=f"Is there a login page in between? Or is {self.endpoint_variable}={self.endpoint} wrong?",
        )

    def get(
        self, url: str, params: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> _Stream:
        """Begin a GET; its network failures are raised as Transient, also while the body is read."""
        headers = {**self._headers, **(headers or {})}
        return _Stream(self._http.stream("GET", url, params=params, headers=headers))

    def retries(self) -> Retries:
        """A new count of the failures of one request."""
        return Retries(self.host)

    @property
    def host(self) -> str:
        """The hub's host, for messages."""
        return urlsplit(self.endpoint).netloc.rpartition("@")[2]

    def check(self, response: httpx.Response, what: str) -> None:
        """Raise unless the request succeeded.

        Raises:
            Transient: worth another try.
            SourceError: refused, or not there.
        """
        if response.is_success:
            return
        status, host = response.status_code, response.url.host
        if status in _BUSY:
            raise Transient(f"{host} answered HTTP {status}", wait=_retry_after(response))
        if status in (401, 403):
            gated = response.headers.get("X-Error-Code") == "GatedRepo"
            reason = "it is gated" if gated else "it does not exist, is private, or is gated"
            state = "was not accepted" if self._headers else "is not set"
            raise SourceError(
                f"{host} refused {what} (HTTP {status}): {reason}",
                hint=f"Check the name. If its licence has to be accepted, do that on {host}; then set "
                f"{self.token_variable} to a token of that account ({self.token_variable} {state}).",
            )
        if status == 404:
            raise SourceError(
                f"{host} has no {what}", hint="Check the name, its upper and lower case, and the revision."
            )
        raise SourceError(f"{host} answered HTTP {status} for {what}")


def _is_web_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        return False


class _Stream:
    """`with` around a response that turns httpx's request errors into Transient."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __enter__(self) -> httpx.Response:
        import httpx

        try:
            response: httpx.Response = self._manager.__enter__()
        except httpx.RequestError as error:
            raise Transient(_describe(error)) from error
        return response

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import httpx

        self._manager.__exit__(kind, error, trace)
        if isinstance(error, httpx.RequestError):
            raise Transient(_describe(error)) from error


def _describe(error: httpx.RequestError) -> str:
    return f"{error.request.url.host}: {error or type(error).__name__}"


def _retry_after(response: httpx.Response) -> float:
    seconds = response.headers.get("Retry-After", "")
    return min(float(seconds), _LONGEST_RETRY_AFTER) if seconds.isdecimal() else 0.0


class Retries:
    """Counts the failures in a row of one request, and waits between its tries."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._failures = 0

    def failed(self, error: Transient) -> None:
        """Wait before the next try.

        Raises:
            NetworkError: there were enough tries.
        """
        if self._failures == len(RETRY_DELAYS):
            raise NetworkError(
                f"{self._host} did not deliver in {self._failures + 1} tries; the last one: {error}",
                hint="Check the connection. What was downloaded is kept; run the same command again.",
            ) from error
        delay = max(RETRY_DELAYS[self._failures], error.wait)
        self._failures += 1
        logger.info("%s; trying again in %.1f s", error, delay)
        time.sleep(delay)

    def progressed(self) -> None:
        """The last try brought something: a long download may be cut many times and still arrive."""
        self._failures = 0
