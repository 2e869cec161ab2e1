"""The weights that a build begins with, in the forms that its steps need. Each is made once, when asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alight.artifact import Artifact, digest_of
from alight.blobs import hash_file
from alight.errors import BadInput, MissingExtra, Unsupported
from alight.evaluate import Progress
from alight.folders import folder_of
from alight.gguf import GGUFHeader, read_headers
from alight.planner import Form, Shape, shape_of_checkpoint, shape_of_gguf
from alight.sources.hub import Address
from alight_converters.build_workspace import cache, digest_of_path, key_of
from alight_converters.documents import HUB, local
from alight_converters.quantize.gguf import Fallbacks, merge, quantize

if TYPE_CHECKING:  # torch is not needed to quantize a GGUF
    from alight_converters.calibration import Calibration
    from alight_converters.checkpoint import Checkpoint

FLOATS = ("F32", "F16", "BF16")
# What the model writes itself: enough for an importance matrix to settle. Of a given text all is used, up to the most:
# a matrix is a mean, which hardly changes afterwards.
ROWS, LENGTH = 32, 128
FEWEST_ROWS, MOST_ROWS = 4, 1024


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
        self.fallbacks: dict[str, Fallbacks] = {}  # of each form that was made here

    @property
    def is_gguf(self) -> bool:
        return self._artifact is not None and self._artifact.format == "gguf"

    @cached_property
    def digest(self) -> str:
        """Of the weights, the same wherever they lie."""
        if self._artifact and self.is_gguf:
            layers = {self._artifact.files[layer.path]: layer for layer in self._artifact.layers}
            digests = [layers[file].digest or hash_file(file) for file in self._artifact.weights]
            return digests[0] if len(digests) == 1 else digest_of("\n".join(digests).encode())
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
        """Of the GGUF that is quantized; of a split one, with the tensors of all parts."""
        return read_headers(self._artifact.weights if self._artifact and self.is_gguf else [self.gguf])

    @cached_property
    def gguf(self) -> Path:
        """The GGUF that is quantized, in one file."""
        if self._artifact and self.is_gguf:
            first, *rest = self._artifact.weights
            return merge(self._named(first), self.folder / "whole.gguf") if rest else first
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

        path = self._named(self._origin.weights[0]) if self.is_gguf else folder_of(self._origin)
        return open_source(path, cache() / "sources")

    def _named(self, file: Path) -> Path:
        """A file of the artifact under its own name, beside the others: in the store, it is named by its digest."""
        assert self._artifact is not None
        inside = next(path for path, known in self._artifact.files.items() if known == file)
        return folder_of(self._artifact) / inside

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
            self.gguf,
            self.folder / f"{form.name}.gguf",
            form.type,
            imatrix=imatrix if form.imatrix else None,
            fallbacks=self.fallbacks.setdefault(form.name, {}),
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
    checkpoint: Checkpoint, given: str | Path | None, seed: int, progress: Progress | None = None
) -> Calibration:
    """Rows of the user's text, files or data set, or of text that the model writes.

    Raises:
        BadInput: the text is too short, or a file is not as `Calibration.of_file` wants it.
        SourceError, NetworkError, DiskFull: a data set of the hub cannot be fetched.
    """
    from alight_converters.calibration import Calibration

    if given is None:
        return Calibration.sampled(checkpoint, ROWS, LENGTH, seed, progress=progress)
    tokenizer = checkpoint.tokenizer()
    if _is_text(given):
        return Calibration.of_text(
            str(given), tokenizer, MOST_ROWS, LENGTH, fewest=FEWEST_ROWS, origin="the calibration text"
        )
    made = Calibration.of_file(local(given), tokenizer, MOST_ROWS, LENGTH, fewest=FEWEST_ROWS)
    return replace(made, origin=given) if isinstance(given, str) else made  # an address, not a folder's name


def calibration_key(given: str | Path | None, seed: int) -> dict[str, Any]:
    """What decides the rows of `calibration_of`, but for the checkpoint.

    Raises:
        BadInput: there is no such file. SourceError, NetworkError, DiskFull: a data set cannot be fetched.
    """
    if given is None:
        return {"seed": seed}
    rows = {"fewest": FEWEST_ROWS, "most": MOST_ROWS}
    return rows | (
        {"text": key_of(text=given)} if _is_text(given) else {"files": digest_of_path(local(given))}
    )


def check_calibration(given: str | Path | None) -> None:
    """What can be told before any work, and without the network.

    Raises:
        BadInput: there is no such file or folder, or the address of a data set is wrong.
    """
    if isinstance(given, Path) and not given.exists():
        raise BadInput(
            f"the calibration text {given} does not exist",
            hint=f"Give a file, a folder, or {HUB}organisation/name.",
        )
    if isinstance(given, str) and not _is_text(given):
        Address.of_dataset(given)


def _is_text(given: str | Path) -> bool:
    """The text itself, and not where it is."""
    return isinstance(given, str) and not given.startswith("hf://")


def told(calibration: Calibration) -> str:
    """What rows are, for the report."""
    most = " (no more are used)" if len(calibration.rows) == MOST_ROWS else ""
    return f"{calibration.origin}, {calibration.tokens:,} tokens{most}"


def _dtype(checkpoint: Checkpoint) -> str:
    return str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
