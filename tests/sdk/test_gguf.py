"""The GGUF header reader, on real weights and on hostile bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import llama_cpp
import pytest
from gguf_writer import F32, Q8_0, gguf, tiny
from hypothesis import given
from hypothesis import strategies as st

from alight.errors import InvalidModelFile
from alight.gguf import TYPES, read_header


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return path


def test_real_weights(smollm2_file: Path) -> None:
    header = read_header(smollm2_file)
    assert header.architecture == "llama"
    assert header.get("block_count") == 30
    assert header.parameters == 134_515_008
    assert header.quantization == "Q4_1"
    assert len(header.tensors) == 272
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152
    assert smollm2_file.stat().st_size - 4_000_000 < header.weight_bytes < smollm2_file.stat().st_size


def test_type_table_is_ggmls_own() -> None:
    import ctypes

    base = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    base.ggml_type_size.restype = ctypes.c_size_t
    base.ggml_blck_size.restype = ctypes.c_int64
    base.ggml_type_name.restype = ctypes.c_char_p
    for number, (name, block, size) in TYPES.items():
        assert base.ggml_type_name(number).decode().upper() == name
        assert (base.ggml_blck_size(number), base.ggml_type_size(number)) == (block, size), name


def test_tiny(tmp_path: Path) -> None:
    header = read_header(written(tmp_path, tiny()))
    assert header.parameters == 64
    assert header.weight_bytes == 256


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GG", "too few"),
        (b"hello, I am a text file, not a model, whatever my name", "not a GGUF"),
        (tiny()[:-1], "truncated"),
        (tiny()[:60], "truncated"),
        (gguf({}, tensor_count=1 << 40), "cannot be"),
        (gguf({}, key_count=(1 << 64) - 1), "cannot be"),
        (gguf({}, key_count=5), "truncated"),
        (gguf({}, [("t", (32, 1 << 60), F32, 0)]), "cannot be"),
        (gguf({}, [("t", (31,), Q8_0, 0)], bytes(64)), "cannot be"),
        (gguf({}, [("t", (32,), F32, 1 << 50)], bytes(128)), "truncated"),
        (gguf({}, [("t", (32,), 200, 0)], bytes(128)), "unknown to this alight"),
        (gguf({"general.alignment": 0}, [("t", (32,), F32, 0)], bytes(128)), "alignment"),
    ],
)
def test_damaged_files_are_told(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(InvalidModelFile, match=says):
        read_header(written(tmp_path, data))


@given(st.integers(0, len(tiny()) - 1), st.binary(min_size=1, max_size=8))
def test_no_damage_does_worse_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes
) -> None:
    data = tiny()
    path = written(tmp_path_factory.mktemp("gguf"), data[:at] + noise + data[at + len(noise) :])
    with contextlib.suppress(InvalidModelFile):
        read_header(path)
