"""Models that see: a projector (mmproj) turns an image into embeddings, which are read like tokens.

llama.cpp's libmtmd cuts an image as its model was trained to, and encodes it. In a request's tokens an
image has a number of places like any text, with negative ids made of the image's own bytes: so the prefix
cache knows the same image again, and never takes one for another.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp as C
import llama_cpp.mtmd_cpp as M
import numpy as np
from numpy.typing import NDArray

from alight.errors import BadInput, EngineError, InvalidModelFile, Unsupported
from alight.gguf import read_header
from alight.images import check_image
from alight_targets.llama_cpp.native import NativeContext, NativeModel, complaint, on_log

# How these read an image depends on what is before it in the prompt; here each is prepared on its own.
_NOT_YET = ("deepseek4v", "hunyuanvl")


@dataclass(slots=True)
class Image:
    """A piece of an image that is encoded in one go, at its place in a request.

    Attributes:
        ids: what stands for it among the request's tokens; all are negative.
        positions: how many positions it takes; fewer than ids where they have several dimensions (M-RoPE).
        start: of its ids among the request's tokens.
    """

    ids: list[int]
    positions: int
    start: int
    _vision: Vision
    _chunk: int
    _owner: _Chunks  # keeps the chunk alive
    _encoded: NDArray[np.float32] | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    def decode(self, context: NativeContext, sequence: int, position: int) -> bool:
        """Read it into a sequence, from `position` on. False, with nothing changed, when there is no room.

        Raises:
            EngineError: llama.cpp cannot.
        """
        if self._encoded is None:  # it is kept until there is room
            self._encoded = self._vision.encode(self._chunk, len(self.ids))
        done = self._vision.decode(self._chunk, self._encoded, context, sequence, position)
        if done:
            self._encoded = None
        return done


class Vision:
    """The projector of a model.

    Args:
        file: its GGUF.
        batch: tokens at most in one decode.

    Raises:
        InvalidModelFile: it cannot be loaded, or is another model's.
        Unsupported: it is of a kind that cannot be used here.
    """

    def __init__(
        self, file: Path, model: NativeModel, *, batch: int, threads: int, flash_attention: bool
    ) -> None:
        if not file.is_file():
            raise BadInput(f"there is no projector {file}", hint="Give the path of its GGUF (mmproj).")
        metadata = read_header(file).metadata
        kind = metadata.get("clip.vision.projector_type") or metadata.get("clip.projector_type")
        if kind in _NOT_YET:
            raise Unsupported(f"the projector {file.name} is a {kind}", hint="Load the model without it.")
        self._batch = batch
        M.mtmd_helper_log_set(on_log, ctypes.c_void_p(0))
        params = M.mtmd_context_params_default()
        params.use_gpu = False
        params.print_timings = False
        params.warmup = False
        params.n_threads = threads
        params.flash_attn_type = (
            C.LLAMA_FLASH_ATTN_TYPE_AUTO if flash_attention else C.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.pointer = M.mtmd_init_from_file(str(file).encode(), model.pointer, params)
        if not self.pointer:
            raise InvalidModelFile(f"llama.cpp cannot load the projector {file.name}: {complaint()}")
        if not M.mtmd_support_vision(self.pointer):
            self.close()
            raise Unsupported(
                f"the projector {file.name} is not for images", hint="Load the model without it."
            )
        self._width = int(C.llama_model_n_embd_inp(model.pointer))
        # Should an image not decode, libmtmd would have ffmpeg try it as a film. No such program is there.
        self._options = M.mtmd_helper_init_opt_default()
        self._options.video_params.ffmpeg_bin_dir = os.devnull.encode()

    def place(self, prompt: Sequence[int | bytes]) -> tuple[list[int], list[Image]]:
        """A prompt's tokens, with ids for its images, and the images.

        Raises:
            BadInput: an image that cannot be used. Unsupported: one that is too large for this model here.
        """
        tokens: list[int] = []
        images: list[Image] = []
        for item in prompt:
            if isinstance(item, bytes):
                for part in self._parts(item):
                    if isinstance(part, Image):
                        part.start = len(tokens)
                        images.append(part)
                    tokens += part.ids if isinstance(part, Image) else part
            else:
                tokens.append(item)
        if images and images[-1].end == len(tokens):
            raise BadInput("the prompt ends with an image", hint="Put some text after it.")
        return tokens, images

    def encode(self, chunk: int, count: int) -> NDArray[np.float32]:
        """The embeddings of an image, shape (count, width)."""
        if M.mtmd_encode_chunk(self.pointer, chunk) != 0:
            raise EngineError(f"llama.cpp failed to encode an image: {complaint()}")
        found = M.mtmd_get_output_embd(self.pointer)
        rows: NDArray[np.float32] = np.ctypeslib.as_array(found, shape=(count, self._width)).copy()
        return rows

    def decode(
        self, chunk: int, rows: NDArray[np.float32], context: NativeContext, sequence: int, position: int
    ) -> bool:
        """Read embeddings into a sequence; False, with nothing changed, when there is no room."""
        at_once = int(C.llama_n_ubatch(context.pointer))
        if len(rows) > at_once and M.mtmd_decode_use_non_causal(
            self.pointer, chunk
        ):  # would abort the process
            raise EngineError(
                f"an image of {len(rows)} tokens is more than {at_once}, which are computed at once"
            )
        code = M.mtmd_helper_decode_image_chunk(
            self.pointer,
            context.pointer,
            chunk,
            rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            position,
            sequence,
            context.batch,
            ctypes.byref(C.llama_pos(0)),
            M.mtmd_helper_post_decode_callback(),
            None,
        )
        NativeContext.decoded += 1
        if code not in (0, 1):
            raise EngineError(f"llama.cpp failed to decode an image (code {code}): {complaint()}")
        if code == 1:
            context.forget(sequence, position)  # it may have read a part
        return bool(code == 0)

    def close(self) -> None:
        if self.pointer:
            M.mtmd_free(self.pointer)
            self.pointer = None

    # -- inside ----------------------------------------------------------------------------------

    def _parts(self, data: bytes) -> list[list[int] | Image]:
        """An image as this model reads it: tokens that mark where it begins and ends, and its pieces."""
        chunks = self._cut(data)
        numbers = hashlib.shake_128(data)
        parts: list[list[int] | Image] = []
        for pointer in chunks:
            count = int(M.mtmd_input_chunk_get_n_tokens(pointer))
            if M.mtmd_input_chunk_get_type(pointer) == M.MTMD_INPUT_CHUNK_TYPE_TEXT:
                length = ctypes.c_size_t(0)
                found = M.mtmd_input_chunk_get_tokens_text(pointer, ctypes.byref(length))
                parts.append(list(found[: length.value]))
                continue
            if count > self._batch and M.mtmd_decode_use_non_causal(self.pointer, pointer):
                raise Unsupported(
                    f"the image has {count} tokens, which this model must read at once",
                    hint=f"Here it can read {self._batch} at once: send a smaller image.",
                )
            numbers.update(b"piece")  # each piece of an image has other ids
            ids = np.frombuffer(numbers.digest(4 * count), "<i4") | np.int32(-(2**31))
            positions = int(M.mtmd_input_chunk_get_n_pos(pointer))
            parts.append(Image(ids.tolist(), positions, -1, self, pointer, chunks))
        return parts

    def _cut(self, data: bytes) -> _Chunks:
        check_image(data)
        raw = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        bitmap = M.mtmd_helper_bitmap_init_from_buf(self.pointer, raw, len(data), False, self._options)
        if not bitmap:
            complaint()  # names ffmpeg
            raise BadInput("the image cannot be decoded", hint="The file is damaged: send it again.")
        chunks = _Chunks()
        try:
            part = M.mtmd_input_part(text=None, bitmap=bitmap)
            parts = (ctypes.POINTER(M.mtmd_input_part) * 1)(ctypes.pointer(part))
            if M.mtmd_tokenize_from_parts(self.pointer, chunks.pointer, parts, 1, False) != 0:
                raise BadInput(f"the image cannot be prepared: {complaint()}")
        finally:
            M.mtmd_bitmap_free(bitmap)
        return chunks


class _Chunks:
    """What libmtmd made of an image; freed when nobody has it any more."""

    def __init__(self) -> None:
        self.pointer = M.mtmd_input_chunks_init()
        weakref.finalize(self, M.mtmd_input_chunks_free, self.pointer)

    def __iter__(self) -> Iterator[int]:
        for i in range(M.mtmd_input_chunks_size(self.pointer)):
            yield M.mtmd_input_chunks_get(self.pointer, i)
