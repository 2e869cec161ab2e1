"""A thin, owned layer over llama-cpp-python's low-level API: a model and a context.

Everything that touches C is here: pointers are freed once, return codes become errors, and llama.cpp's
own log goes to Python's logging.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from alight.errors import EngineError, InvalidModelFile

log = logging.getLogger("alight.llama_cpp")

KV_TYPES = {"f16": C.GGML_TYPE_F16, "q8_0": C.GGML_TYPE_Q8_0, "q4_0": C.GGML_TYPE_Q4_0}
_ERROR = 4  # ggml_log_level; llama.cpp's warnings are chatter to a user of alight, so the rest is debug

_complaints: deque[str] = deque(maxlen=4)  # llama.cpp tells what went wrong by its log, not by return code


@C.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == _ERROR:
        _complaints.append(text.decode(errors="replace").strip())
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", text.decode(errors="replace").strip())


@cache
def start() -> None:
    """Initialise llama.cpp once in this process."""
    C.llama_log_set(_on_log, ctypes.c_void_p(0))
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
        self.adds_bos = bool(C.llama_vocab_get_add_bos(self.vocab))
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
        return bool(C.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        if self.pointer:
            C.llama_model_free(self.pointer)
            self.pointer = None


class NativeContext:
    """A KV cache and compute buffers over a model.

    Args:
        context: tokens the KV cache holds.
        batch: tokens at most in one `decode`.
        outputs: rows of logits at most in one `decode`: the output buffer is this times the vocabulary.
    """

    def __init__(
        self,
        model: NativeModel,
        *,
        context: int,
        batch: int,
        outputs: int,
        threads: int,
        kv_type: str = "f16",
        flash_attention: bool = True,
    ) -> None:
        params = C.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = min(batch, context)
        params.n_outputs_max = params.n_outputs_max_per_seq = min(outputs, params.n_batch)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv_type]
        params.flash_attn_type = (
            C.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else C.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.model = model
        self.pointer = C.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise EngineError(f"llama.cpp cannot make a context of {context} tokens: {complaint()}")
        self.context = int(C.llama_n_ctx(self.pointer))
        self.batch = int(C.llama_n_batch(self.pointer))
        self.memory = C.llama_get_memory(self.pointer)
        self._batch = C.llama_batch_init(self.batch, 0, 1)

    def decode(self, tokens: Sequence[int], position: int, *, outputs: bool | None = None) -> None:
        """Run tokens of sequence 0, the first at `position`. Logits are kept for the last token, or for
        all (`outputs=True`)."""
        b: Any = self._batch
        count = len(tokens)
        b.n_tokens = count
        for i, token in enumerate(tokens):
            b.token[i] = token
            b.pos[i] = position + i
            b.n_seq_id[i] = 1
            b.seq_id[i][0] = 0
            b.logits[i] = bool(outputs)
        b.logits[count - 1] = True
        code = int(C.llama_decode(self.pointer, b))
        if code != 0:
            raise EngineError(f"llama.cpp failed to decode {count} tokens (code {code}): {complaint()}")

    def logits(self, count: int) -> NDArray[np.float32]:
        """The logits of the last `decode`, shape (count, vocabulary); a view until the next one."""
        pointer = C.llama_get_logits(self.pointer)
        rows: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(count, self.model.vocabulary))
        return rows

    def forget_from(self, position: int) -> bool:
        """Drop cached tokens from `position` on. False where the model's memory cannot do that."""
        return bool(C.llama_memory_seq_rm(self.memory, 0, position, -1))

    def clear(self) -> None:
        C.llama_memory_clear(self.memory, False)

    def close(self) -> None:
        if self.pointer:
            C.llama_batch_free(self._batch)
            C.llama_free(self.pointer)
            self.pointer = None
