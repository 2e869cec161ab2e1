"""Images from outside: their kind and size, by their headers. Nothing is decoded here.

A few bytes can claim any number of pixels, so they are counted before anything makes room for them.
"""

from __future__ import annotations

import struct

from alight.errors import BadInput

MAX_PIXELS = 64_000_000

_JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive: those that decoders know
_JPEG_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length


def check_image(data: bytes) -> tuple[int, int]:
    """The width and height, in pixels, of a PNG, JPEG, GIF or BMP file.

    Raises:
        BadInput: it is none of those, is cut short in its header, or is too large.
    """
    try:
        size = _size(data)
    except struct.error:
        raise BadInput("the image is cut short", hint="Send the whole file.") from None
    if size is None:
        raise BadInput("the image is not a PNG, JPEG, GIF or BMP file", hint="Convert it to PNG or JPEG.")
    width, height = size
    if width < 1 or height < 1:
        raise BadInput(f"the image has {width} x {height} pixels", hint="The file is damaged.")
    if width * height > MAX_PIXELS:
        raise BadInput(
            f"the image has {width} x {height} pixels", hint=f"Send at most {MAX_PIXELS:,} pixels."
        )
    return width, height


def _size(data: bytes) -> tuple[int, int] | None:
    width: int
    height: int
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack_from(">II", data, 16)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        width, height = struct.unpack_from("<HH", data, 6)
    elif data.startswith(b"BM"):
        width, height = struct.unpack_from("<ii", data, 18)
        height = abs(height)  # negative: its rows go from top to bottom
    elif data.startswith(b"\xff\xd8\xff"):
        return _jpeg_size(data)
    else:
        return None
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while True:
        mark, kind = struct.unpack_from("BB", data, at)
        if mark != 0xFF:
            raise BadInput("the image is a damaged JPEG file", hint="Send it again.")
        if kind == 0xFF:  # padding
            at += 1
        elif kind in _JPEG_ALONE:
            at += 2
        elif kind in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        else:
            (length,) = struct.unpack_from(">H", data, at + 2)
            at += 2 + length
