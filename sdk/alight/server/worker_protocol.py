"""What the server and a worker process say to each other, over two pipes.

A frame is a JSON header and a payload of bytes (arrays), each with its length in front. Requests go one
way, `{"id": 7, "call": "score", …}`, and replies the other, `{"id": 7, …}`; many requests run at once, and
their frames are mixed. Nothing is pickled: a worker that goes wrong can send nonsense, but no code.
"""

from __future__ import annotations

import json
import math
import operator
import os
import struct
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alight.artifact import Artifact, Description, Layer
from alight.chat import ChatTemplate
from alight.errors import AlightError, EngineError
from alight.target import Chunk, ModelInfo, Prompt, Scores, TokenLogprob, Usage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The request numbers of frames that belong to no request: log records, signs of life, what all generations said.
LOG, BEAT, CHUNKS = -1, -2, -3
CALLS = frozenset({"score", "tokenize", "prompt_tokens", "detokenize", "embed", "rerank", "metrics"})
PART = 1 << 20  # bytes; a larger payload goes in parts, so that the tokens of others pass between them

_LENGTHS = struct.Struct("<IQ")
_MAX_HEADER = 1 << 28
_to_json = json.JSONEncoder(separators=(",", ":")).encode  # made once: it is used for every token

Header = dict[str, Any]


class Channel:
    """Frames over two file descriptors. Any thread may send; one reads."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._in = os.fdopen(incoming, "rb", buffering=1 << 16)
        self._out: int | None = outgoing
        self._pending: deque[bytes] = deque()
        self._writing = threading.Lock()
        self._parts: dict[int, bytearray] = {}  # by request: what came of a payload that is not complete

    def send(self, header: Header, payload: bytes = b"") -> None:
        """Send one frame.

        Raises:
            OSError: the other side is gone.
        """
        whole = memoryview(payload)
        while len(whole) > PART:
            self._send({"id": header["id"], "part": True}, whole[:PART])
            whole = whole[PART:]
        self._send(header, whole)

    def _send(self, header: Header, payload: bytes | memoryview) -> None:
        text = _to_json(header).encode()
        self._pending.append(b"".join((_LENGTHS.pack(len(text), len(payload)), text, payload)))
        # Whoever has the lock writes what all have put there, in one go. Who finds it taken goes on: the
        # holder looks again after it let go.
        while self._pending and self._writing.acquire(blocking=False):
            try:
                self._write_pending()
            finally:
                self._writing.release()

    def _write_pending(self) -> None:
        ready = []
        while self._pending:
            ready.append(self._pending.popleft())
        if self._out is None:
            raise BrokenPipeError("the channel is closed")
        data = memoryview(b"".join(ready))
        while data:
            data = data[os.write(self._out, data) :]

    def receive(self) -> tuple[Header, bytearray] | None:
        """The next whole frame; None when the other side is gone."""
        while True:
            frame = self._read_frame()
            if frame is None:
                return None
            header, payload = frame
            if header.get("part"):
                self._parts.setdefault(header["id"], bytearray()).extend(payload)
                continue
            if self._parts and header.get("id") in self._parts:
                begun = self._parts.pop(header["id"])
                begun.extend(payload)
                payload = begun
            return header, payload

    def _read_frame(self) -> tuple[Header, bytearray] | None:
        lengths = self._in.read(_LENGTHS.size)
        if len(lengths) < _LENGTHS.size:
            return None
        header_size, payload_size = _LENGTHS.unpack(lengths)
        if header_size > _MAX_HEADER or payload_size > PART:
            return None  # something else wrote into the pipe: as bad as a hang-up
        text = self._in.read(header_size)
        payload = bytearray(self._in.read(payload_size)) if payload_size else bytearray()
        if len(text) < header_size or len(payload) < payload_size:
            return None
        header = json.loads(text)
        return header, payload

    def hang_up(self, timeout: float) -> bool:
        """Close the writing side, which ends the other one; False if a write is stuck in it."""
        if not self._writing.acquire(timeout=timeout):
            return False
        try:
            if self._out is not None:
                os.close(self._out)
                self._out = None
            return True
        finally:
            self._writing.release()

    def close(self) -> None:
        """Close the reading side, from the thread that reads."""
        self._in.close()


# -- prompts -----------------------------------------------------------------------------------------


def prompt_to_json(prompt: Prompt) -> tuple[str | list[int | list[int]], bytes]:
    """A prompt as JSON and a payload: an image is there as the list of its length, and its bytes here."""
    if isinstance(prompt, str):
        return prompt, b""
    images = [item for item in prompt if isinstance(item, bytes)]
    # (index: also NumPy's integers, which JSON does not know.)
    told = [[len(item)] if isinstance(item, bytes) else operator.index(item) for item in prompt]
    return told, b"".join(images)


def prompt_from_json(told: str | list[int | list[int]], payload: bytes | bytearray) -> Prompt:
    if isinstance(told, str):
        return told
    prompt: list[int | bytes] = []
    at = 0
    for item in told:
        if isinstance(item, list):
            prompt.append(bytes(payload[at : at + item[0]]))
            at += item[0]
        else:
            prompt.append(item)
    return prompt


# -- values as JSON ----------------------------------------------------------------------------------


def chunk_to_json(chunk: Chunk) -> list[Any]:
    usage = chunk.usage and [getattr(chunk.usage, name) for name in _USAGE]
    logprobs = [
        [one.token, _text(one.text), one.logprob, [[t, _text(b), p] for t, b, p in one.top]]
        for one in chunk.logprobs
    ]
    return [chunk.text, chunk.tokens, chunk.finish_reason, usage, logprobs]


def chunk_from_json(data: Sequence[Any]) -> Chunk:
    text, tokens, reason, usage, logprobs = data
    return Chunk(
        text,
        tuple(tokens),
        reason,
        Usage(*usage) if usage else None,
        tuple(
            TokenLogprob(token, _bytes(piece), logprob, tuple((t, _bytes(b), p) for t, b, p in top))
            for token, piece, logprob, top in logprobs
        ),
    )


def said_to_json(item: Chunk | Exception) -> Any:
    """What a generation says: a chunk, or the error that ends it."""
    return chunk_to_json(item) if isinstance(item, Chunk) else {"error": error_to_json(item)}


def said_from_json(data: Any) -> Chunk | AlightError:
    return error_from_json(data["error"]) if isinstance(data, dict) else chunk_from_json(data)


_USAGE = [field.name for field in fields(Usage)]


def _text(data: bytes) -> str:
    """Bytes as JSON can hold them: each as the character of its number."""
    return data.decode("latin-1")


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")


T = TypeVar("T")


def options_to_json(options: Any) -> dict[str, Any]:
    """A dataclass of options (Sampling, LoadOptions), without those that have their default."""
    return {
        f.name: value for f in fields(options) if (value := getattr(options, f.name)) != f.default
    }  # a NaN differs from everything, so it would be sent and refused


def options_from_json(kind: type[T], data: Mapping[str, Any]) -> T:
    return kind(**{name: _tuples(value) for name, value in data.items()})


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def artifact_to_json(artifact: Artifact) -> dict[str, Any]:
    return _plain(artifact) | {
        "description": _plain(artifact.description),
        "layers": [_plain(layer) for layer in artifact.layers],
        "files": {path: str(file) for path, file in artifact.files.items()},
        "annotations": dict(artifact.annotations),
    }


def artifact_from_json(data: Mapping[str, Any]) -> Artifact:
    return Artifact(
        **{
            **data,
            "description": options_from_json(Description, data["description"]),
            "layers": tuple(options_from_json(Layer, layer) for layer in data["layers"]),
            "files": {path: Path(file) for path, file in data["files"].items()},
        }
    )


def info_to_json(info: ModelInfo) -> dict[str, Any]:
    return _plain(info) | {"details": json.loads(json.dumps(dict(info.details), default=str))}


def info_from_json(data: Mapping[str, Any]) -> ModelInfo:
    return ModelInfo(**data)


def template_to_json(template: ChatTemplate) -> dict[str, Any]:
    texts = {"source": template.source, "bos": template.bos, "eos": template.eos}
    return {**texts, "control_tokens": template.control_tokens, "vision": template.vision}


def template_from_json(data: Mapping[str, Any]) -> ChatTemplate:
    return ChatTemplate(**data)


def _plain(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


# -- results -----------------------------------------------------------------------------------------


def result_to_json(result: Any) -> tuple[Header, bytes]:
    """What a method of Model returned: JSON, bytes, an array of float32 or Scores; arrays go as payload."""
    import numpy as np

    if isinstance(result, bytes):
        return {"bytes": _text(result)}, b""
    if isinstance(result, Scores):
        arrays = [a for a in (result.logprobs, result.distribution) if a is not None]
        told = {"scores": result.tokens, "top": result.top, "shapes": [a.shape for a in arrays]}
        return told, b"".join(map(_numbers, arrays))
    if isinstance(result, np.ndarray):
        return {"shapes": [result.shape]}, _numbers(result)
    return {"result": result}, b""


def result_from_json(header: Header, payload: bytearray) -> Any:
    if "shapes" not in header:
        return _bytes(header["bytes"]) if "bytes" in header else header["result"]
    arrays = _arrays(header["shapes"], payload)
    if "scores" not in header:
        return arrays[0]
    distribution = arrays[1] if len(arrays) > 1 else None
    return Scores(tuple(header["scores"]), arrays[0], distribution, _tuples(header["top"]))


def _numbers(array: NDArray[Any]) -> bytes:
    return array.astype("<f4", copy=False).tobytes()


def _arrays(shapes: Sequence[Sequence[int]], data: bytearray) -> list[NDArray[np.float32]]:
    import numpy as np

    arrays, at = [], 0
    for shape in shapes:
        count = math.prod(shape)
        flat: NDArray[np.float32] = np.frombuffer(data, "<f4", count, at)
        arrays.append(flat.reshape(shape))
        at += 4 * count
    return arrays


# -- errors ------------------------------------------------------------------------------------------


def error_to_json(error: Exception) -> dict[str, Any]:
    """An error with its class (and the bases of that, for readers who do not know it) and attributes."""
    if not isinstance(error, AlightError):
        error = EngineError(f"the engine failed: {type(error).__name__}: {error}")
    kinds = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, AlightError)]
    facts = {key: value for key, value in vars(error).items() if isinstance(value, str | int | float | None)}
    return {"kinds": kinds, "facts": facts}


def error_from_json(data: Mapping[str, Any]) -> AlightError:
    """The same error: its class, message, hint and numbers. A class that is not alight's becomes its base."""
    known = _errors()
    kind = next((known[name] for name in data["kinds"] if name in known), EngineError)
    facts = data["facts"]
    error = kind.__new__(kind)
    AlightError.__init__(error, str(facts.get("message", "")), hint=str(facts.get("hint", "")))
    vars(error).update(facts)  # such as ContextExceeded.needed, which the class's own constructor sets
    return error


def _errors() -> dict[str, type[AlightError]]:
    found, new = {}, [AlightError]
    while new:
        kind = new.pop()
        found[kind.__name__] = kind
        new += kind.__subclasses__()
    return found
