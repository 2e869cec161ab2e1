"""ggml's tensor types: their sizes, and what llama.cpp's quantizer leaves of a matrix at each."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alight.gguf import TYPES

Floats = NDArray[np.float32]

_NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}  # ggml's types for other things than weights
TENSOR_TYPES = {name: kind for kind, (name, _, _) in TYPES.items() if name not in _NO_WEIGHTS}


def fits(kind: str, columns: int) -> bool:
    """Whether rows of this many columns can be cut into the blocks of a ggml type."""
    return columns % TYPES[TENSOR_TYPES[kind]][1] == 0


def size(kind: str, count: int) -> int:
    """Bytes of this many weights."""
    _, block, block_bytes = TYPES[TENSOR_TYPES[kind]]
    return count // block * block_bytes


def rounded(weights: Floats, kind: str, importance: Floats) -> Floats:
    """What is left of `weights`, shape (rows, columns), after quantizing to a ggml type.

    Args:
        importance: mean squared input per column, shape (columns,). (Types below three bits need it.)
    """
    import gguf

    rows, columns = weights.shape
    weights, importance = np.ascontiguousarray(weights), np.ascontiguousarray(importance)
    packed = np.empty((rows, size(kind, columns)), np.uint8)
    quantize = _quantize_chunk()
    quantize(
        TENSOR_TYPES[kind], weights.ctypes.data, packed.ctypes.data, 0, rows, columns, importance.ctypes.data
    )
    left: Floats = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(TENSOR_TYPES[kind]))
    return left


@cache
def _quantize_chunk() -> Any:
    from llama_cpp._ggml import libggml, libggml_base_path

    name = "ggml_quantize_chunk"
    try:
        function = libggml[name]
    except AttributeError:  # on Windows a handle finds only its own functions, not its dependencies'
        from llama_cpp._ctypes_extensions import load_shared_library

        function = load_shared_library("ggml-base", libggml_base_path)[name]
    pointer, wide = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (ctypes.c_int, pointer, pointer, wide, wide, wide, pointer)
    function.restype = ctypes.c_size_t
    return function
