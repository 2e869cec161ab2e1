"""Request bodies: read within a limit, parsed strictly, and no unknown key ignored.

FastAPI could parse them from the signature of an endpoint, but it insists on `Content-Type:
application/json` (curl -d, which half of Ollama's documentation uses, does not send it), has no limit
on the size, and answers 422 where both APIs say 400.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from alight.errors import nearest
from alight.server.failures import ClientGone, Refused

MAX_BODY = 32 << 20  # room for some photos
_DRAIN = 64 << 20


class Body(BaseModel):
    """The fields of a request that we use; the others are in `model_extra`, for `check_extras`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def words(text: str) -> frozenset[str]:
    """The names in a text, separated by white space."""
    return frozenset(text.split())


T = TypeVar("T", bound=BaseModel)


async def read(request: Request, kind: type[T]) -> T:
    """The body of a request as a `kind`.

    Raises:
        Refused: 413 for a body over the application's limit, 400 for one that does not parse.
    """
    data = await _bytes(request, request.app.state.max_body)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = _path(first["loc"])
        what = f"{where}: {first['msg']}" if where else str(first["msg"])
        raise Refused(400, f"invalid request: {what}", param=where or None) from None


def check_extras(
    body: BaseModel, ignored: frozenset[str], not_yet: Mapping[str, Sequence[Any]], where: str = ""
) -> None:
    """Look at the fields that `body` does not declare.

    Args:
        ignored: known, and harmless to leave out of account.
        not_yet: known, and would change the answer; with the values that ask for nothing. null never does.
        where: put before a field's name in messages.

    Raises:
        Refused: 400 that names the field.
    """
    for key, value in (body.model_extra or {}).items():
        if key in ignored or value is None:
            continue
        name = where + key
        if key in not_yet:
            neutral = not_yet[key]
            if any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral):
                continue  # 1 is 1.0, but not True
            hint = f"Leave it out, or send {json.dumps(neutral[0])}." if neutral else "Leave it out."
            raise Refused(
                400, f"`{name}` is not in this version yet", hint=hint, code="unsupported", param=name
            )
        near = nearest(key, [*type(body).model_fields, *not_yet, *ignored], count=1)
        hint = f"Did you mean `{near[0]}`?" if near else ""
        raise Refused(400, f"unknown field `{name}`", hint=hint, code="unknown_field", param=name)


async def _bytes(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    too_large = Refused(
        413,
        f"the request body is larger than {limit / (1 << 20):g} MiB",
        hint="Send a shorter conversation.",
        code="request_too_large",
    )
    if size > limit and (size > _DRAIN or request.headers.get("expect")):
        raise too_large
    parts: list[bytes] = []
    more = True
    # What is too large is still read (and dropped) for a while: if the connection were closed at once, most
    # clients would see a broken pipe and never the reason.
    seen = 0
    while more and seen <= _DRAIN:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        more = message.get("more_body", False)
        seen += len(part)
        size = max(size, seen)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
    if size > limit:
        raise too_large
    return b"".join(parts)


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") as messages[0].role"""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")
