"""What the server and a worker say to each other."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import pytest

from alight import errors
from alight.errors import (
    AlightError,
    Busy,
    ContextExceeded,
    DiskFull,
    EngineCrashed,
    EngineError,
    MissingExtra,
    ModelNotFound,
)
from alight.server import worker_protocol as protocol
from alight.server.worker_protocol import PART, Channel
from alight.target import Chunk, LoadOptions, Sampling, Scores, TokenLogprob, Usage


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """The two ends of a connection."""
    to_a, from_b = os.pipe()
    to_b, from_a = os.pipe()
    a, b = Channel(to_a, from_a), Channel(to_b, from_b)
    yield a, b
    for end in (a, b):
        end.hang_up(1)
        end.close()


def exchange(ends: tuple[Channel, Channel], header: dict[str, Any], payload: bytes = b"") -> Any:
    sender = threading.Thread(target=ends[0].send, args=(header, payload))
    sender.start()
    received = ends[1].receive()
    sender.join()
    return received


def test_a_frame(ends: tuple[Channel, Channel]) -> None:
    header = {"id": 7, "text": "héllo \ud800 \u2028 👩‍🚀", "minus": -math.inf, "none": None}
    assert exchange(ends, header) == (header, b"")
    assert exchange(ends, {"id": 8}, b"\0\xff" * 5) == ({"id": 8}, b"\0\xff" * 5)


@pytest.mark.parametrize("size", [PART - 1, PART, PART + 1, 3 * PART + 5])
def test_a_large_payload(ends: tuple[Channel, Channel], size: int) -> None:
    payload = os.urandom(size)
    assert exchange(ends, {"id": 7, "end": True}, payload) == ({"id": 7, "end": True}, payload)


def test_many_senders(ends: tuple[Channel, Channel]) -> None:
    """Frames of many threads stay whole, and each thread's in its order, also around a large payload."""
    count, threads = 500, 8

    def send(thread: int) -> None:
        for number in range(count):
            payload = bytes(PART + 9) if number == 250 and thread == 3 else b""
            ends[0].send({"id": thread, "number": number}, payload)

    senders = [threading.Thread(target=send, args=(thread,)) for thread in range(threads)]
    for sender in senders:
        sender.start()
    seen: dict[int, list[int]] = {thread: [] for thread in range(threads)}
    for _ in range(count * threads):
        frame = ends[1].receive()
        assert frame
        seen[frame[0]["id"]].append(frame[0]["number"])
    assert all(numbers == [*range(count)] for numbers in seen.values())
    for sender in senders:
        sender.join()


def test_the_end(ends: tuple[Channel, Channel]) -> None:
    ends[0].send({"id": 1})
    assert ends[0].hang_up(1)
    assert ends[0].hang_up(1)
    assert ends[1].receive() == ({"id": 1}, b"")
    assert ends[1].receive() is None
    with pytest.raises(OSError):
        ends[0].send({"id": 2})


@pytest.mark.parametrize("rubbish", [b"Segmentation fault, core dumped\n", b"\1\0\0\0", b"\xff" * 12])
def test_rubbish_is_a_hang_up(rubbish: bytes) -> None:
    incoming, other = os.pipe()
    os.write(other, rubbish)
    os.close(other)
    channel = Channel(incoming, -1)
    assert channel.receive() is None
    channel.close()


# -- values ----------------------------------------------------------------------------------------


def other_than(default: Any) -> Any:
    """A value of the same kind that is not the default."""
    match default:
        case bool():
            return not default
        case int():
            return default + 1
        case float():
            return default / 2 or 0.5
        case str():
            return default + "x"
        case _:
            return None


SPECIAL: dict[str, Any] = {
    "max_tokens": 5,
    "seed": 2**32 - 2,
    "logprobs": 3,
    "mirostat": 2,
    "dry_base": 2.0,
    "logit_bias": ((5, -math.inf), (6, 1.5)),
    "stop": ("a", "\n\n"),
    "dry_sequence_breakers": ("x",),
    "adapters": (("tone", 0.5),),
    "json_schema": "",  # not together with a grammar
    "context": 64,
    "threads": 2,
    "kv_type": "q8_0",
    "draft": "/draft.gguf",
    "projector": "/eyes.gguf",
    "flash_attention": False,
    "prompt_cache": "/cache",
}


@pytest.mark.parametrize("kind", [Sampling, LoadOptions])
def test_every_option_crosses(kind: type[Any]) -> None:
    values = {}
    for field in fields(kind):
        value = SPECIAL[field.name] if field.name in SPECIAL else other_than(field.default)
        if value is None and isinstance(field.default, tuple):
            value = ("z",) if kind is Sampling else (("z", "/z"),)
        assert value is not None, f"say in this test what {field.name} can be"
        values[field.name] = value
    whole = kind(**values)
    assert round_trip(whole) == whole
    assert round_trip(kind()) == kind()
    assert protocol.options_to_json(kind()) == {}


def round_trip(options: Any) -> Any:
    return protocol.options_from_json(type(options), as_json(protocol.options_to_json(options)))


def as_json(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


def test_every_part_of_a_chunk_crosses() -> None:
    usage = Usage(*range(1, len(fields(Usage)) + 1))
    logprobs = (TokenLogprob(5, b"\xff", -0.5, ((5, b"\xff", -0.5), (6, "é".encode(), -2.0))),)
    chunk = Chunk("é", (5, 6), "length", usage, logprobs)
    assert all(getattr(chunk, f.name) != f.default for f in fields(Chunk) if f.default is not MISSING)
    for one in (chunk, Chunk()):
        assert protocol.chunk_from_json(as_json(protocol.chunk_to_json(one))) == one


def test_results_cross() -> None:
    rows = np.arange(12, dtype=np.float64).reshape(3, 4)
    for result in ([1, 2], {"a": 1.5}, None, b"\xff\0", rows):
        header, payload = protocol.result_to_json(result)
        back = protocol.result_from_json(as_json(header), bytearray(payload))
        assert np.array_equal(back, result) if isinstance(result, np.ndarray) else back == result
    top = (((3, -0.5), (1, -1.5)), ((2, -0.25),))
    scores = Scores((1, 2), rows[0].astype(np.float32), rows.astype(np.float32), top)
    header, payload = protocol.result_to_json(scores)
    back = protocol.result_from_json(as_json(header), bytearray(payload))
    assert (back.tokens, back.top) == ((1, 2), top)
    assert np.array_equal(back.logprobs, scores.logprobs)
    assert np.array_equal(back.distribution, scores.distribution)
    back.logprobs[0] = 1  # an array like any other


ERRORS: list[AlightError] = [
    ContextExceeded(5000, 4096),
    ModelNotFound("smol", ["smoll"]),
    MissingExtra("serving", "serve"),
    DiskFull("/models", 10, 5),
    EngineCrashed("gone", hint="wait", retry_after=2.5),
    Busy("busy", retry_after=3),
    errors.DoesNotFit("it", 2, 1),
    errors.InvalidModelFile("broken"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_cross(error: AlightError) -> None:
    back = protocol.error_from_json(as_json(protocol.error_to_json(error)))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_an_error_of_somebody_else_becomes_its_base() -> None:
    class TooHot(EngineError):
        pass

    data = protocol.error_to_json(TooHot("90 °C"))
    data["kinds"][0] = "TooHotToKnow"
    back = protocol.error_from_json(data)
    assert type(back) is EngineError
    assert back.message == "90 °C"
    bug = protocol.error_from_json(protocol.error_to_json(KeyError("x")))
    assert type(bug) is EngineError
    assert "KeyError: 'x'" in bug.message
