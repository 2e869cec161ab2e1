"""Errors as HTTP: one status for each kind of error, one shape for each API."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from alight.errors import (
    AlightError,
    BadInput,
    Busy,
    ContextExceeded,
    DiskFull,
    DoesNotFit,
    EngineCrashed,
    InvalidModelFile,
    MissingExtra,
    ModelNotFound,
    RemoteError,
    TargetUnavailable,
    Unsupported,
)

log = logging.getLogger(__name__)

# The first row that matches decides, so a subclass stands before its base.
_STATUS: tuple[tuple[type[AlightError], int, str], ...] = (
    (ContextExceeded, 400, "context_length_exceeded"),
    (Unsupported, 400, "unsupported"),
    (InvalidModelFile, 500, "invalid_model_file"),  # a BadInput, but the server's, not the client's
    (BadInput, 400, "invalid_request"),
    (ModelNotFound, 404, "model_not_found"),
    (DoesNotFit, 503, "does_not_fit"),  # this server cannot, now; another one, or this one later, may
    (TargetUnavailable, 501, "target_unavailable"),
    (MissingExtra, 501, "missing_extra"),
    (DiskFull, 507, "disk_full"),
    (Busy, 503, "busy"),
    (EngineCrashed, 500, "engine_crashed"),
    (RemoteError, 502, "remote_error"),
    (AlightError, 500, "server_error"),
)


class Refused(AlightError):
    """A request that the server itself refuses.

    Args:
        status: the HTTP status.
        code: a word for programs. param: the field of the request that is to blame.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        hint: str = "",
        code: str = "invalid_request",
        param: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param


class ClientGone(Exception):
    """The client hung up; nobody reads the answer."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a client sees it."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None  # seconds

    @classmethod
    def of(cls, error: Exception) -> Failure:
        if isinstance(error, Refused):
            return cls(error.status, _sentence(error), error.code, error.param)
        if isinstance(error, AlightError):
            status, code = next((s, c) for kind, s, c in _STATUS if isinstance(error, kind))
            wait = math.ceil(getattr(error, "retry_after", 0.0)) or None
            status = 503 if wait else status  # not now, but later
            return cls(status, _sentence(error), code, "model" if status == 404 else None, wait)
        if isinstance(error, HTTPException):
            return cls(
                error.status_code,
                str(error.detail),
                "not_found" if error.status_code == 404 else "http_error",
            )
        # A bug: its text may hold anything, so it goes to the log (uvicorn's) and not to the client.
        return cls(
            500, f"internal error ({type(error).__name__}); the server's log has the details", "server_error"
        )

    def openai(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def ollama(self) -> dict[str, Any]:
        return {"error": self.message}


def respond(path: str, error: Exception) -> JSONResponse:
    """The answer to a request that failed, in the shape of the API that the path belongs to."""
    failure = Failure.of(error)
    if failure.status >= 500 and isinstance(error, AlightError):
        log.warning("%d: %s", failure.status, failure.message)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if failure.retry_after:
        headers["Retry-After"] = str(failure.retry_after)
    if failure.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    shape = failure.ollama() if path.startswith("/api/") else failure.openai()
    return JSONResponse(shape, failure.status, headers)


def _sentence(error: AlightError) -> str:
    return f"{error.message.rstrip('.')}. {error.hint}" if error.hint else error.message
