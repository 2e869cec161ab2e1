"""The responses that a next one can go on from: in memory, the newest ones, and gone with the server."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from alight.server.failures import Refused

MOST = 1000  # responses
MOST_BYTES = 64 << 20  # of JSON


@dataclass(frozen=True, slots=True)
class Kept:
    """A response, and the conversation up to and with it (without instructions, which are each request's own)."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    size: int


class Memory:
    """Keeps the newest responses. Their ids are long and random: whoever knows one may read it."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0

    def keep(self, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        size = len(json.dumps([response, messages], default=lambda image: " " * len(image)))
        self._kept[response["id"]] = Kept(response, messages, size)
        self._bytes += size
        while len(self._kept) > self._most or self._bytes > self._most_bytes:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.size

    def find(self, id: str, param: str | None = None) -> Kept:
        """Raises Refused, 404, for one that is not kept (any more)."""
        if id not in self._kept:
            hint = "Only the newest responses are kept, until the server ends; send the whole conversation."
            raise Refused(404, f"no response {id!r}", hint=hint, code="response_not_found", param=param)
        self._kept.move_to_end(id)
        return self._kept[id]

    def forget(self, id: str) -> None:
        self._bytes -= self.find(id).size
        del self._kept[id]
