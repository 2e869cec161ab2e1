"""Device and Accelerator: what a machine has to run a model with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from alight.errors import BadInput

ACCELERATOR_KINDS = ("cuda", "rocm", "metal", "vulkan", "ascend")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU or NPU.

    Attributes:
        kind: one of ACCELERATOR_KINDS, the programming interface it is reached by.
        name: as its driver calls it.
        memory_bytes: its own memory; None: it shares the host's; 0: it has its own, size unknown.
        bandwidth: sustained bytes/s of its memory; None: unknown.
        flops: sustained fp16 matrix flop/s; None: unknown.
    """

    kind: str
    name: str
    memory_bytes: int | None = None
    bandwidth: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ACCELERATOR_KINDS:
            known = ", ".join(ACCELERATOR_KINDS)
            raise BadInput(f"accelerator kind is {self.kind!r}", hint=f"It must be one of {known}.")

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Accelerator:
        """The inverse of `to_json`. Raises BadInput, naming the key."""
        memory = _optional_number(data, "memory_bytes")
        return cls(
            kind=_text(data, "kind"),
            name=_text(data, "name"),
            memory_bytes=None if memory is None else int(memory),
            bandwidth=_optional_number(data, "bandwidth"),
            flops=_optional_number(data, "flops"),
        )


@dataclass(frozen=True, slots=True)
class Device:
    """What a machine has. All speeds are sustained ones, not those of the datasheet.

    Attributes:
        id: "this" for a measured machine, else the profile's name, such as "raspberry-pi-5-8gb".
        name: board or processor, for people.
        arch: "x86_64", "aarch64", "armv7l", …
        cores: physical performance cores worth computing on: no hyper-threads, no little cores.
        memory_bytes: memory of the host (or of the container that limits us).
        available_bytes: what a model may use of it now; of a profile, the total less a system reserve.
        bandwidth: bytes/s of memory, all cores; bytes read plus bytes written by a large copy.
        int8_ops: op/s of llama.cpp's int8 dot kernels, all cores; a multiply-add is 2 ops.
        flops: float32 flop/s, all cores.
        instructions: the instruction sets that matter to the kernels, such as "avx2" or "dotprod".
        temperature: of the hottest sensor, °C; None: none can be read.
        sources: where each figure comes from: field name -> text; "measured" for a measured one.
    """

    id: str
    name: str
    arch: str
    cores: int
    memory_bytes: int
    available_bytes: int
    bandwidth: float
    int8_ops: float
    flops: float
    instructions: tuple[str, ...] = ()
    accelerators: tuple[Accelerator, ...] = ()
    temperature: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {
            **asdict(self),
            "instructions": list(self.instructions),
            "accelerators": [accelerator.to_json() for accelerator in self.accelerators],
            "sources": dict(self.sources),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Device:
        """The inverse of `to_json`. Raises BadInput, naming the key that is missing or wrong.

        Keys that are not known are ignored: a peer of a newer version may say more.
        """
        sources = data.get("sources", {})
        if not isinstance(sources, Mapping):
            raise BadInput(f"device: sources is {sources!r}", hint="It must be an object of texts.")
        return cls(
            id=_text(data, "id"),
            name=_text(data, "name"),
            arch=_text(data, "arch"),
            cores=int(_number(data, "cores")),
            memory_bytes=int(_number(data, "memory_bytes")),
            available_bytes=int(_number(data, "available_bytes")),
            bandwidth=float(_number(data, "bandwidth")),
            int8_ops=float(_number(data, "int8_ops")),
            flops=float(_number(data, "flops")),
            instructions=tuple(str(name) for name in _list(data, "instructions")),
            accelerators=tuple(Accelerator.from_json(item) for item in _list(data, "accelerators")),
            # Below zero is a real temperature, so it is not a _number.
            temperature=None if data.get("temperature") is None else _finite(data, "temperature"),
            sources={str(key): str(value) for key, value in sources.items()},
        )


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise BadInput(f"device: {key} is {value!r}", hint="It must be a text.")
    return value


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key, [])
    if not isinstance(value, (list, tuple)):
        raise BadInput(f"device: {key} is {value!r}", hint="It must be a list.")
    return list(value)


def _finite(data: Mapping[str, Any], key: str) -> float:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadInput(f"device: {key} is {value!r}", hint="It must be a number.")
    return value


def _number(data: Mapping[str, Any], key: str) -> float:
    value = _finite(data, key)
    if value < 0:
        raise BadInput(f"device: {key} is {value!r}", hint="It must not be negative.")
    return value


def _optional_number(data: Mapping[str, Any], key: str) -> float | None:
    return None if data.get(key) is None else _number(data, key)
