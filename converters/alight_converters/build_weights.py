"""The weights that a build begins with, in the forms that its steps need. Each is made once, when asked for."""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from alight.artifact import Artifact
from alight.blobs import hash_file
from alight.errors import MissingExtra, Unsupported
from alight.evaluate import Progress
from alight.gguf import GGUFHeader, read_header
from alight.planner import Form, Shape, shape_of_checkpoint, shape_of_gguf
from alight.store import Store
from alight_converters.build_workspace import cache, key_of
from alight_converters.quantize.gguf import quantize

if TYPE_CHECKING:  # torch is not needed to quantize a GGUF
    from alight_converters.calibration import Calibration
    from alight_converters.checkpoint import Checkpoint

FLOATS = ("F32", "F16", "BF16")
# Enough for an importance matrix to settle; a longer text changes the KL by less than its sampling error.
ROWS, LENGTH = 32, 128
_FEWEST_ROWS = 4


class Weights:
    """A model to quantize: a GGUF, or a checkpoint that is exported once.

    Args:
        origin: an artifact (GGUF, checkpoint or LoRA adapter), or a checkpoint.
        folder: where what is made may be kept.
    """

    def __init__(self, origin: Artifact | Checkpoint, folder: Path) -> None:
        self.folder = folder
        self._origin = origin
        self._artifact = origin if isinstance(origin, Artifact) else None
        if self._artifact and self._artifact.format == "gguf" and len(self._artifact.weights) > 1:
            raise Unsupported(
                f"{self._artifact.name!r} is split into {len(self._artifact.weights)} files",
                hint="Merge them first: llama-gguf-split --merge.",
            )

    @property
    def is_gguf(self) -> bool:
        return self._artifact is not None and self._artifact.format == "gguf"

    @cached_property
    def digest(self) -> str:
        """Of the weights, the same wherever they lie."""
        if self._artifact and self.is_gguf:
            (layer,) = (x for x in self._artifact.layers if x.path.endswith(".gguf"))
            return layer.digest or hash_file(self.gguf)
        return self.checkpoint.digest

    @cached_property
    def shape(self) -> Shape:
        """Its sizes, from headers alone where that is possible."""
        if self.is_gguf:
            return shape_of_gguf([self.header])
        if self._artifact and self._artifact.format == "safetensors":
            return shape_of_checkpoint(dict(self._artifact.files))
        return shape_of_checkpoint({f.name: f for f in self.checkpoint.folder.iterdir()})

    @property
    def header(self) -> GGUFHeader:
        return read_header(self.gguf)

    @cached_property
    def gguf(self) -> Path:
        """The GGUF that is quantized."""
        if self._artifact and self.is_gguf:
            return self._artifact.weights[0]
        from alight_converters.export.gguf import export

        dtype = {"float16": "F16", "bfloat16": "BF16"}.get(_dtype(self.checkpoint), "F32")
        (file,) = export(self.checkpoint, self.folder / "weights.gguf", dtype, shard=0)
        return file

    @property
    def quantization(self) -> str:
        """The type of `gguf`."""
        return self.header.quantization

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model as passes and importance matrices need it."""
        if not isinstance(self._origin, Artifact):
            return self._origin
        if find_spec("torch") is None:
            raise MissingExtra(f"opening {self._origin.name!r} as a checkpoint", "convert")
        from alight_converters.sources import open_source

        files = self._origin.files
        path = next(iter(files.values())).parent
        if any(
            f != path / inside for inside, f in files.items()
        ):  # blobs of the store have no names of their own
            kept = cache() / "sources" / self._origin.digest.removeprefix("sha256:")[:32]
            path = Store().materialize(self._origin, kept)
        if self.is_gguf:
            path = path / next(x.path for x in self._origin.layers if x.path.endswith(".gguf"))
        return open_source(path, cache() / "sources")

    @property
    def has_family(self) -> bool:
        """Whether it can be opened as a checkpoint at all."""
        from alight_converters.families import family_of_gguf

        if not self.is_gguf:
            return True
        try:
            family_of_gguf(self.header.architecture)
        except Unsupported:
            return False
        return True

    def float_gguf(self) -> Path:
        """The weights in float: what all forms are measured against. The caller deletes it if it is not `gguf`."""
        if self.quantization in FLOATS:
            return self.gguf
        return quantize(self.gguf, self.folder / "float.gguf", "F32")

    def make(self, form: Form, imatrix: Path | None) -> Path:
        """A GGUF of the form."""
        return quantize(
            self.gguf, self.folder / f"{form.name}.gguf", form.type, imatrix=imatrix if form.imatrix else None
        )


def imatrix_of(
    checkpoint: Checkpoint, calibration: Calibration, progress: Progress | None = None, *, device: str = "cpu"
) -> Path:
    """The importance matrix of a checkpoint, made once for each calibration."""
    file = cache() / "imatrix" / f"{key_of(weights=checkpoint.digest, rows=calibration.digest)}.gguf"
    if not file.exists():
        from alight_converters.passes import silent
        from alight_converters.quantize.imatrix import collect

        collect(checkpoint, calibration, device=device, progress=progress or silent).save(file)
    return file


def calibration_of(
    checkpoint: Checkpoint, text: str | None, seed: int, progress: Progress | None = None
) -> Calibration:
    """Rows of the user's text, or of text that the model writes.

    Raises:
        BadInput: the text is too short.
    """
    from alight_converters.calibration import Calibration

    if text is None:
        return Calibration.sampled(checkpoint, ROWS, LENGTH, seed, progress=progress)
    tokenizer = checkpoint.tokenizer()
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    rows = max(_FEWEST_ROWS, min(ROWS, tokens // LENGTH))
    return Calibration.of_text(text, tokenizer, rows, LENGTH, origin="the calibration text")


def _dtype(checkpoint: Checkpoint) -> str:
    return str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
