"""Images in requests, as messages of alight have them: {"type": "image", "data": bytes}."""

from __future__ import annotations

import base64
import binascii
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alight.errors import Unsupported
from alight.server.failures import Refused
from alight.target import Model


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image", "data": data}


def read_base64(text: Any, where: str) -> bytes:
    """Raises Refused: 400, naming the place."""
    param = where.partition("[")[0]
    if not isinstance(text, str):
        raise Refused(400, f"`{where}` is {type(text).__name__}", hint="It must be base64 text.", param=param)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"`{where}` is not base64: {error}", param=param) from None


def read_url(url: Any, where: str) -> bytes:
    """The image in a data: URL. Others are refused: fetching them would let any client send this server
    anywhere in its network.

    Raises:
        Refused: 400, naming the place.
    """
    param = where.partition("[")[0]
    form = "It must be a data: URL, such as data:image/png;base64,…"
    if not isinstance(url, str):
        raise Refused(400, f"`{where}` has no url", hint=form, param=param)
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        what = f"`{where}` is {url[:60]!r}, and this server fetches no images"
        raise Refused(400, what, hint=form, code="unsupported", param=param)
    kind, comma, data = rest.partition(",")
    if not comma:
        raise Refused(400, f"`{where}` is cut short", hint=form, param=param)
    if kind.lower().endswith(";base64"):
        return read_base64(urllib.parse.unquote(data), where)
    return urllib.parse.unquote_to_bytes(data)


def with_images(messages: Sequence[Any]) -> list[Any]:
    """OpenAI's messages with their `image_url` parts read. What else may be wrong is not looked at.

    Raises:
        Refused: 400, naming the part.
    """
    return [_read(message, f"messages[{i}].content") for i, message in enumerate(messages)]


def _read(message: Any, where: str) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts = [_part(part, f"{where}[{i}]") for i, part in enumerate(content)]
    return {**message, "content": parts}


def _part(part: Any, where: str) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return part
    image = part.get("image_url")
    return image_part(
        read_url(image.get("url") if isinstance(image, Mapping) else image, f"{where}.image_url")
    )


def check_sight(model: Model, messages: Sequence[Mapping[str, Any]], field: str = "content") -> None:
    """Raises Unsupported, naming the message, where there is an image and the model cannot see."""
    if not model.info.vision:
        for i, message in enumerate(messages):
            if any(_images(message)):
                raise no_images(f"messages[{i}].{field}")


def _images(message: Mapping[str, Any]) -> Iterator[bool]:
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        yield isinstance(part, Mapping) and part.get("type") == "image"


def no_images(where: str) -> Unsupported:
    return Unsupported(f"`{where}`: this model cannot see images", hint="Send text only.")
