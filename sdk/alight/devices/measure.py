"""Measure this machine's speed: memory bandwidth, and matrix products with ggml's own kernels.

Every figure is the best of many short runs: what disturbs a measurement only ever makes it slower.
That matters most for ggml, whose OpenMP threads spin: with another program on one of the cores, a run can
take 20 times as long.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from alight import openmp

log = logging.getLogger(__name__)

MEASURED = "measured"

_COPY_SECONDS = 0.3  # time to fill the arrays at most, and time to copy them
_FILL_WORDS = 1024**2
_MATMUL_SECONDS = 0.2
_ONE_CORE_SECONDS = 0.1
_MOST_RUNS = 100  # ggml takes a work buffer from the context at every run; twice this many fit it

# A weight matrix as wide as those of a 1-3 B model times a batch of prompt tokens: small, so that a run
# ends before the system's scheduler cuts in.
_COLUMNS, _ROWS, _BATCH = 2048, 1024, 32
_MATMUL_OPS = 2 * _COLUMNS * _ROWS * _BATCH

_GGML_F32, _GGML_Q8_0 = 0, 8  # enum ggml_type
_CONTEXT_BYTES = 64 * 1024**2

_Pair: TypeAlias = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A speed and where it comes from."""

    value: float
    source: str


def memory_bandwidth(threads: int, available_bytes: int) -> Figure:
    """Bytes/s read plus written by `threads` threads that copy arrays of their own at the same time.

    The arrays are large against the last-level cache where memory allows, and never more than a tenth
    of `available_bytes`.
    """
    wanted = min(max(64 * 1024**2, 4 * _last_level_cache()), 512 * 1024**2, available_bytes // 10)
    with ThreadPoolExecutor(threads) as pool:
        pairs = list(pool.map(_filled_pair, [wanted // threads] * threads))
        seconds = _best_time(lambda: list(pool.map(_copy, pairs)), _COPY_SECONDS, most_runs=1000)
    return Figure(2 * sum(target.nbytes for target, _ in pairs) / seconds, MEASURED)


def _filled_pair(total_bytes: int) -> _Pair:
    """A target and a source array of `total_bytes` together; less where filling them takes too long.

    Filled, not just allocated: a page that was never written costs a page fault, and all such pages read
    as the same zero page. In a virtual machine the first touch of a page can be very slow.
    """
    words = max(total_bytes // 2 // 8, 1024)
    target, source = np.empty(words), np.empty(words)
    begin = time.perf_counter()
    filled = 0
    while filled < words and (filled == 0 or time.perf_counter() - begin < _COPY_SECONDS):
        end = min(filled + _FILL_WORDS, words)
        target[filled:end], source[filled:end] = 1.0, 2.0
        filled = end
    return target[:filled], source[:filled]


def _copy(pair: _Pair) -> None:
    np.copyto(*pair)  # a memcpy, without the interpreter lock


def matmul_speeds(threads: int, instructions: tuple[str, ...] = ()) -> tuple[Figure, Figure]:
    """(int8 op/s, float32 flop/s) of a matrix product on `threads` threads.

    Measured with the ggml library that llama_cpp brings. Where that cannot be loaded, float32 is
    numpy's and int8 is an estimate from it; the figures' sources say so.
    """
    try:
        ggml = _Ggml()
        # In a thread that ends: OpenMP keeps a team per calling thread, and with more of them than cores it
        # throttles every model that this process loads later (to a third of its speed, on two cores).
        with ThreadPoolExecutor(1) as short_lived:
            kinds = (_GGML_Q8_0, _GGML_F32)
            int8, float32 = short_lived.map(lambda kind: ggml.matmul_speed(kind, threads), kinds)
        return int8, float32
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        log.info("ggml cannot be used, so int8 speed is estimated: %s", error)
        return _numpy_speeds(instructions)


def _numpy_speeds(instructions: tuple[str, ...]) -> tuple[Figure, Figure]:
    a = np.ones((_ROWS, _COLUMNS), np.float32)
    b = np.ones((_COLUMNS, _BATCH), np.float32)
    flops = _MATMUL_OPS / _best_time(lambda: a @ b, _MATMUL_SECONDS, _MOST_RUNS)
    # A dot product instruction does four int8 multiply-adds in the place of one float32.
    with_dot = {"dotprod", "i8mm", "avx_vnni", "avx512_vnni", "amx_int8"}.intersection(instructions)
    ratio = 2 if with_dot else 1  # half of what the instructions could do: the blocks' scales cost time
    return (
        Figure(ratio * flops, f"estimated: {ratio} × numpy's float32 speed, as ggml could not be used"),
        Figure(flops, "measured with numpy, as ggml could not be used"),
    )


def _best_time(run: Callable[[], object], seconds: float, most_runs: int) -> float:
    """The shortest wall-clock time of `run`, repeated for about `seconds`, at least twice."""
    run()  # starts threads and fills caches
    best = float("inf")
    begin = time.perf_counter()
    for count in range(1, most_runs):
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        best = min(best, end - start)
        if end - begin > seconds and count >= 2:
            break
    return best


def _last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()  # such as "2048K"
        except OSError:
            continue
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes)


class _InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class _Ggml:
    """The few functions of ggml that a matrix product needs, from the library that llama_cpp ships."""

    def __init__(self) -> None:
        openmp.calm()
        from llama_cpp._ctypes_extensions import load_shared_library
        from llama_cpp._ggml import libggml, libggml_base_path

        # One handle finds the functions of ggml-base and ggml-cpu too, as dependencies of libggml. (Loading
        # those by name as well could give the process a second copy: the wheel has no symbolic links.)
        self._libraries: list[ctypes.CDLL] = [libggml]
        if sys.platform == "win32":  # where a handle finds only its own
            self._libraries += [load_shared_library(n, libggml_base_path) for n in ("ggml-base", "ggml-cpu")]
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        wide = ctypes.c_int64
        self.cpu_init = self._function("ggml_cpu_init", None)
        self.init = self._function("ggml_init", pointer, _InitParams)
        self.free = self._function("ggml_free", None, pointer)
        self.new_tensor_2d = self._function("ggml_new_tensor_2d", pointer, pointer, integer, wide, wide)
        self.get_data = self._function("ggml_get_data", pointer, pointer)
        self.mul_mat = self._function("ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.new_graph = self._function("ggml_new_graph", pointer, pointer)
        self.expand = self._function("ggml_build_forward_expand", None, pointer, pointer)
        self.compute = self._function("ggml_graph_compute_with_ctx", integer, pointer, pointer, integer)
        self.quantize = self._function(
            "ggml_quantize_chunk", size, integer, pointer, pointer, wide, wide, wide, pointer
        )

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        for library in self._libraries:
            try:
                function = library[name]  # unlike library.name a new object, so no one else's types change
            except AttributeError:
                continue
            function.restype, function.argtypes = result, arguments
            return function
        raise AttributeError(f"llama_cpp's ggml has no {name}")

    def matmul_speed(self, weight_type: int, threads: int) -> Figure:
        """Op/s of weights (rows × columns, of `weight_type`) times a batch of float32 vectors."""
        self.cpu_init()
        context = self.init(_InitParams(_CONTEXT_BYTES, None, False))
        if not context:
            raise RuntimeError(f"ggml cannot allocate {_CONTEXT_BYTES} bytes")
        try:
            weights = self.new_tensor_2d(context, weight_type, _COLUMNS, _ROWS)
            batch = self.new_tensor_2d(context, _GGML_F32, _COLUMNS, _BATCH)
            random = np.random.default_rng(0)
            values = random.standard_normal((_ROWS, _COLUMNS), np.float32)
            self._fill(batch, _GGML_F32, values[:_BATCH])
            self._fill(weights, weight_type, values)
            graph = self.new_graph(context)
            self.expand(graph, self.mul_mat(context, weights, batch))
            every = _best_time(lambda: self.compute(context, graph, threads), _MATMUL_SECONDS, _MOST_RUNS)
            one = _best_time(lambda: self.compute(context, graph, 1), _ONE_CORE_SECONDS, _MOST_RUNS)
        finally:
            self.free(context)
        if one < every:
            return Figure(_MATMUL_OPS / one, "measured on one core: other programs kept the others busy")
        return Figure(_MATMUL_OPS / every, MEASURED)

    def _fill(self, tensor: int, tensor_type: int, values: np.ndarray[Any, Any]) -> None:
        rows, columns = values.shape
        self.quantize(tensor_type, values.ctypes.data, self.get_data(tensor), 0, rows, columns, None)
