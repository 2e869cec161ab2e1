"""Read the header of a GGUF file: metadata and tensor table, never the weights.

The file comes from outside, so every count and size is checked against the bytes that are there.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alight.errors import InvalidModelFile

MAGIC = b"GGUF"

# ggml tensor type -> (name, weights per block, bytes per block). From ggml's type table.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}

# general.file_type -> the name people use. From llama.h.
FILE_TYPES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 20  # metadata keys or tensors; real files have a few thousand


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the tensor table. `shape` is innermost first, as ggml has it; `offset` is in the data part."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def count(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a GGUF says about itself."""

    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    file_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    def get(self, key: str, default: Any = None) -> Any:
        """A hyper-parameter of the architecture: `get("block_count")` reads `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def parameters(self) -> int:
        return sum(t.count for t in self.tensors)

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def quantization(self) -> str:
        return FILE_TYPES.get(self.metadata.get("general.file_type", -1), "unknown")


def read_header(path: Path | str) -> GGUFHeader:
    """Read and check the header of one GGUF file.

    Raises:
        InvalidModelFile: not a GGUF, truncated, or its sizes do not match the file.
    """
    path = Path(path)
    size = path.stat().st_size
    if size < 24:
        raise InvalidModelFile(f"{path.name} has {size} bytes, too few for a GGUF", hint=_AGAIN)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data, path.name).header()


def read_headers(paths: Sequence[Path]) -> GGUFHeader:
    """The header of a model in one file or split into several: the first's metadata, the tensors of all."""
    first, *rest = [read_header(path) for path in paths]
    tensors = tuple(t for header in (first, *rest) for t in header.tensors)
    size = first.file_bytes + sum(header.file_bytes for header in rest)
    return replace(first, tensors=tensors, file_bytes=size)


_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def parts_of(path: Path) -> list[Path]:
    """The file itself, or, where it is one part of a split model ("x-00001-of-00003.gguf"), all parts in order.

    Raises:
        InvalidModelFile: a part is not beside it.
    """
    found = _PART.fullmatch(path.name)
    if found is None or not 1 <= int(found["number"]) <= int(found["count"]):
        return [path]
    count = int(found["count"])
    parts = [path.with_name(f"{found['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise InvalidModelFile(
            f"{path.name} is one of {count} parts, of which {len(missing)} are missing, first {missing[0]}",
            hint="Put all parts into one folder.",
        )
    return parts


def stem_of(path: Path) -> str:
    """A model's name by its file's: without the suffix, and the number of a part."""
    found = _PART.fullmatch(path.name)
    return found["stem"] if found else path.stem


_AGAIN = "It may be truncated or damaged: fetch it again."


class _Reader:
    """A cursor over untrusted bytes: every read is bounds-checked."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data = data
        self.name = name
        self.at = 0

    def header(self) -> GGUFHeader:
        if self.data[:4] != MAGIC:
            raise InvalidModelFile(
                f"{self.name} is not a GGUF file (it starts with {bytes(self.data[:4])!r})",
                hint="Give a .gguf file, or a folder with config.json and safetensors.",
            )
        self.at = 4
        version = self.number("I")
        if version not in (2, 3):
            raise InvalidModelFile(
                f"{self.name} is GGUF version {version}", hint="alight reads versions 2 and 3."
            )
        tensors, keys = self.number("Q"), self.number("Q")
        if tensors > _MAX_ENTRIES or keys > _MAX_ENTRIES:
            raise self.lie(f"claims {tensors} tensors and {keys} keys")
        metadata = {self.string(): self.value(self.number("I")) for _ in range(keys)}
        table = tuple(self.tensor() for _ in range(tensors))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
            raise self.lie(f"claims an alignment of {alignment!r}")
        start = -(-self.at // alignment) * alignment
        for t in table:
            if start + t.offset + t.nbytes > len(self.data):
                raise InvalidModelFile(
                    f"{self.name} is truncated: tensor {t.name} ends at byte {start + t.offset + t.nbytes}, "
                    f"the file at {len(self.data)}",
                    hint=_AGAIN,
                )
        return GGUFHeader(version, metadata, table, len(self.data))

    def tensor(self) -> Tensor:
        name = self.string()
        dimensions = self.number("I")
        if not 0 < dimensions <= 4:
            raise self.lie(f"tensor {name} claims {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind = self.number("I")
        offset = self.number("Q")
        if kind not in TYPES:
            raise InvalidModelFile(f"{self.name}: tensor {name} has type {kind}, unknown to this alight")
        type_name, block, block_bytes = TYPES[kind]
        count = 1
        for d in shape:
            count *= d
        if not 0 < count < 1 << 48 or shape[0] % block:
            raise self.lie(f"tensor {name} claims shape {list(shape)} of {type_name}")
        return Tensor(name, shape, type_name, offset, count // block * block_bytes)

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        raise self.lie(f"claims a value of type {kind}")

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            form = f"<{count}{_SCALARS[kind]}"
            size = count * struct.calcsize(f"<{_SCALARS[kind]}")
            return list(struct.unpack(form, self.take(size)))
        reader: Callable[[], Any]
        if kind == _STRING:
            smallest, reader = 8, self.string
        elif kind == _ARRAY:
            raise self.lie("nests arrays")
        else:
            raise self.lie(f"claims an array of type {kind}")
        if count * smallest > len(self.data) - self.at:
            raise self.lie(f"claims an array of {count} values")
        return [reader() for _ in range(count)]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise InvalidModelFile(
                f"{self.name} is truncated: {size} bytes are announced at byte {self.at} of {len(self.data)}",
                hint=_AGAIN,
            )
        piece = self.data[self.at : self.at + size]
        self.at += size
        return piece

    def lie(self, claim: str) -> InvalidModelFile:
        return InvalidModelFile(f"{self.name} {claim}, which cannot be", hint=_AGAIN)
