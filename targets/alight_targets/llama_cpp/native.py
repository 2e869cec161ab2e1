"""A thin, owned layer over llama-cpp-python's low-level API: a model and a context.

Everything that touches C is here: pointers are freed once, return codes become errors, and llama.cpp's
own log goes to Python's logging.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

import llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from alight.errors import EngineError, InvalidModelFile

log = logging.getLogger("alight.llama_cpp")

KV_TYPES = {"f16": C.GGML_TYPE_F16, "q8_0": C.GGML_TYPE_Q8_0, "q4_0": C.GGML_TYPE_Q4_0}
POOLING = {
    "none": C.LLAMA_POOLING_TYPE_NONE,
    "mean": C.LLAMA_POOLING_TYPE_MEAN,
    "cls": C.LLAMA_POOLING_TYPE_CLS,
    "last": C.LLAMA_POOLING_TYPE_LAST,
    "rank": C.LLAMA_POOLING_TYPE_RANK,
}
_ERROR = 4  # ggml_log_level; llama.cpp's warnings are chatter to a user of alight, so the rest is debug

_complaints: deque[str] = deque(maxlen=4)  # llama.cpp tells what went wrong by its log, not by return code


@C.llama_log_callback  # type: ignore[untyped-decorator]
def on_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == _ERROR:
        _complaints.append(text.decode(errors="replace").strip())
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", text.decode(errors="replace").strip())


@cache
def start() -> None:
    """Initialise llama.cpp once in this process."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort should end the process, not start a debugger
    C.llama_log_set(on_log, ctypes.c_void_p(0))
    C.llama_backend_init()


def complaint() -> str:
    """What llama.cpp last said was wrong, for an error message; forgotten afterwards."""
    said = "; ".join(_complaints)
    _complaints.clear()
    return said or "it gave no reason"


class NativeModel:
    """Weights and vocabulary.

    Args:
        files: the GGUF file, or all parts of a split one in order.
        gpu_layers: how many layers go to an accelerator; 0 keeps all on the host.
    """

    def __init__(self, files: Sequence[Path], *, gpu_layers: int = 0, mmap: bool = True) -> None:
        start()
        params = C.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.load_mode = C.LLAMA_LOAD_MODE_MMAP if mmap else C.LLAMA_LOAD_MODE_NONE
        if len(files) == 1:
            self.pointer = C.llama_model_load_from_file(str(files[0]).encode(), params)
        else:
            paths = (ctypes.c_char_p * len(files))(*(str(f).encode() for f in files))
            self.pointer = C.llama_model_load_from_splits(paths, len(files), params)
        if not self.pointer:
            raise InvalidModelFile(f"llama.cpp cannot load {files[0].name}: {complaint()}")
        self.vocab = C.llama_model_get_vocab(self.pointer)
        self.vocabulary = int(C.llama_vocab_n_tokens(self.vocab))
        self.trained_context = int(C.llama_model_n_ctx_train(self.pointer))
        self.parameters = int(C.llama_model_n_params(self.pointer))
        self.width = int(C.llama_model_n_embd(self.pointer))
        kinds = {str(number): name for name, number in POOLING.items() if number}
        self.pooling = kinds.get(self.metadata(f"{self.metadata('general.architecture')}.pooling_type"), "")
        self.recurrent = bool(
            C.llama_model_is_recurrent(self.pointer) or C.llama_model_is_hybrid(self.pointer)
        )
        # Is the state of a sequence all that it needs elsewhere? Not of a sliding window: it leaves out older cells,
        # which a shorter beginning needs. And positions of several dimensions have a form that state.py does not know.
        flat = C.llama_model_rope_type(self.pointer) not in (
            C.LLAMA_ROPE_TYPE_MROPE,
            C.LLAMA_ROPE_TYPE_IMROPE,
        )
        self.movable = flat and not self.recurrent and int(C.llama_model_n_swa(self.pointer)) == 0
        self.bos, self.eos = (
            int(C.llama_vocab_bos(self.vocab)),
            int(C.llama_vocab_eos(self.vocab)),
        )  # -1: none
        self.adds_bos = bool(C.llama_vocab_get_add_bos(self.vocab))
        self.end_tokens = [t for t in range(self.vocabulary) if C.llama_vocab_is_eog(self.vocab, t)]
        self._ends = frozenset(self.end_tokens)
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def metadata(self, key: str) -> str:
        """A metadata value as text; empty where there is none."""
        size = 1 << 16
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = int(C.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size))
            if length < size:
                return buffer.value.decode(errors="replace") if length >= 0 else ""
            size = length + 1

    def chat_template(self) -> str:
        found: bytes | None = C.llama_model_chat_template(self.pointer, None)
        return found.decode(errors="replace") if found else ""

    def token_text(self, token: int) -> str:
        """How the vocabulary spells a token; empty for the null token."""
        if token < 0:
            return ""
        found: bytes | None = C.llama_vocab_get_text(self.vocab, token)
        return found.decode(errors="replace") if found else ""

    def control_tokens(self) -> list[str]:
        """The texts that `tokenize(special=True)` reads as one token: control and user-defined ones."""
        special = C.LLAMA_TOKEN_ATTR_CONTROL | C.LLAMA_TOKEN_ATTR_USER_DEFINED | C.LLAMA_TOKEN_ATTR_UNKNOWN
        return [
            self.token_text(t)
            for t in range(self.vocabulary)
            if C.llama_vocab_get_attr(self.vocab, t) & special
        ]

    def separator(self) -> list[int]:
        """The end of a text and the separator before the next one, as ranking models were trained."""
        ids = (int(C.llama_vocab_eos(self.vocab)), int(C.llama_vocab_sep(self.vocab)))
        return [t for t in ids if t >= 0]

    def tokenize(self, text: str, *, bos: bool, special: bool) -> list[int]:
        data = text.encode(errors="replace")
        size = len(data) + 8
        while True:
            tokens = (C.llama_token * size)()
            count = int(C.llama_tokenize(self.vocab, data, len(data), tokens, size, bos, special))
            if count >= 0:
                return list(tokens[:count])
            size = -count

    def detokenize(self, tokens: Sequence[int], *, special: bool) -> bytes:
        ids = (C.llama_token * len(tokens))(*tokens)
        size = 16 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = int(C.llama_detokenize(self.vocab, ids, len(tokens), buffer, size, False, special))
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that one token adds to a running text."""
        known = self._pieces.get((token, special))
        if known is None:
            buffer = ctypes.create_string_buffer(256)
            length = int(C.llama_token_to_piece(self.vocab, token, buffer, 256, 0, special))
            known = self._pieces[token, special] = buffer.raw[: max(length, 0)]
        return known

    def is_end(self, token: int) -> bool:
        """Does this token end a generation (end of sequence, of turn, …)?"""
        return token in self._ends

    def adapter(self, file: Path) -> int:
        """Load a LoRA adapter; it lives as long as the model."""
        pointer = C.llama_adapter_lora_init(self.pointer, str(file).encode())
        if not pointer:
            raise InvalidModelFile(f"llama.cpp cannot load the adapter {file.name}: {complaint()}")
        return ctypes.cast(pointer, ctypes.c_void_p).value or 0

    def close(self) -> None:
        if self.pointer:
            C.llama_model_free(self.pointer)
            self.pointer = None


class NativeContext:
    """A KV cache that sequences share cell by cell, and compute buffers, over a model.

    Args:
        context: tokens the KV cache holds, over all sequences.
        batch: tokens at most in one `decode`.
        outputs: rows of logits at most in one `decode`: the output buffer is this times the vocabulary.
        sequences: how many there can be; their numbers are 0 to sequences - 1.
        unified: whether they share all cells; if not, each has an equal part of them.
        ubatch: tokens at most that are computed at once; sets the size of the compute buffers.
        pooling: "none", "mean", "cls", "last" or "rank" for embeddings instead of logits; "" for logits.
    """

    def __init__(
        self,
        model: NativeModel,
        *,
        context: int,
        batch: int,
        outputs: int,
        threads: int,
        sequences: int = 1,
        kv_type: str = "f16",
        flash_attention: bool = True,
        pooling: str = "",
        unified: bool = True,
        ubatch: int = 0,
    ) -> None:
        params = C.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = min(batch, context)
        params.n_ubatch = min(ubatch or batch, context)
        params.n_seq_max = sequences
        params.kv_unified = unified
        params.n_outputs_max = min(
            max(outputs, sequences), params.n_batch
        )  # llama.cpp wants one per sequence
        params.n_outputs_max_per_seq = params.n_outputs_max
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv_type]
        params.flash_attn_type = (
            C.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else C.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        if pooling:
            params.embeddings = True
            params.pooling_type = POOLING[pooling]
        self.model = model
        self.pointer = C.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise EngineError(f"llama.cpp cannot make a context of {context} tokens: {complaint()}")
        self.context = int(C.llama_n_ctx(self.pointer))
        self.batch = int(C.llama_n_batch(self.pointer))
        self.outputs = int(params.n_outputs_max)
        self._memory = C.llama_get_memory(self.pointer)
        self._adapters: tuple[tuple[int, float], ...] = ()
        # The batch lives in NumPy arrays, so that filling it is one assignment per column.
        self._tokens = np.zeros(self.batch, np.int32)
        self._positions = np.zeros(self.batch, np.int32)
        self._sequences = np.zeros(self.batch, np.int32)
        self._wanted = np.zeros(self.batch, np.int8)
        self._ones = np.ones(self.batch, np.int32)
        base, step = self._sequences.ctypes.data, self._sequences.itemsize
        self._sequence_pointers = np.arange(self.batch, dtype=np.uint64) * step + base
        self._batch = C.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(C.llama_token)),
            embd=None,
            pos=self._positions.ctypes.data_as(ctypes.POINTER(C.llama_pos)),
            n_seq_id=self._ones.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._sequence_pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(C.llama_seq_id))),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    decoded: ClassVar[int] = 0  # batches, by all contexts of this process

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> bool:
        """Run one batch: tokens with their position and sequence; `wanted` says whose output to keep.

        Returns False, with nothing changed, when the KV cache has no room for it.
        """
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._sequences[:count] = sequences
        self._wanted[:count] = wanted
        self._batch.n_tokens = count
        code = int(C.llama_decode(self.pointer, self._batch))
        NativeContext.decoded += 1
        if code not in (0, 1):
            raise EngineError(f"llama.cpp failed to decode {count} tokens (code {code}): {complaint()}")
        return code == 0

    def logits(self, index: int) -> NDArray[np.float32]:
        """The logits of batch entry `index` of the last `decode`, shape (vocabulary,); a view until the next one."""
        pointer = C.llama_get_logits_ith(self.pointer, index)
        row: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(self.model.vocabulary,))
        return row

    def all_logits(self, count: int) -> NDArray[np.float32]:
        """All kept rows of the last `decode`, shape (count, vocabulary); a view until the next one."""
        pointer = C.llama_get_logits(self.pointer)
        rows: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(count, self.model.vocabulary))
        return rows

    def embedding(self, sequence: int, width: int) -> NDArray[np.float32]:
        """The pooled embedding of a sequence of the last `decode`; a copy."""
        pointer = C.llama_get_embeddings_seq(self.pointer, sequence)
        if not pointer:
            raise EngineError("llama.cpp gave no embedding")
        row: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(width,)).copy()
        return row

    def share(self, source: int, target: int, length: int) -> None:
        """Let sequence `target` begin with the first `length` tokens of `source`, in the same cells."""
        C.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def forget(self, sequence: int, position: int = 0) -> bool:
        """Drop a sequence's tokens from `position` on. False where the model's memory cannot do that."""
        return bool(C.llama_memory_seq_rm(self._memory, sequence, position, -1))

    def use_adapters(self, adapters: tuple[tuple[int, float], ...]) -> None:
        """Apply these LoRA adapters (pointer, scale) to what is decoded from now on."""
        if adapters != self._adapters:
            pointers = (ctypes.c_void_p * len(adapters))(*(p for p, _ in adapters))
            scales = (ctypes.c_float * len(adapters))(*(s for _, s in adapters))
            as_expected = ctypes.cast(pointers, ctypes.POINTER(C.llama_adapter_lora_p_ctypes))
            if C.llama_set_adapters_lora(self.pointer, as_expected, len(adapters), scales) != 0:
                raise EngineError(f"llama.cpp cannot apply the adapters: {complaint()}")
            self._adapters = adapters

    def state_size(self, sequence: int) -> int:
        """Bytes of a sequence's keys and values."""
        return int(C.llama_state_seq_get_size(self.pointer, sequence))

    def state(self, sequence: int) -> bytes:
        """A copy of a sequence's keys and values; fits contexts of the same model, KV type and layout."""
        buffer = np.empty(self.state_size(sequence), np.uint8)
        pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        size = int(C.llama_state_seq_get_data(self.pointer, pointer, len(buffer), sequence))
        return buffer[:size].tobytes()

    def set_state(self, sequence: int, state: bytes) -> bool:
        """Put keys and values into a sequence. False, with the sequence empty, where they do not fit."""
        data = np.frombuffer(state, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if int(C.llama_state_seq_set_data(self.pointer, pointer, len(data), sequence)):
            return True
        self.forget(sequence)
        return False

    def close(self) -> None:
        if self.pointer:
            C.llama_free(self.pointer)
            self.pointer = None
