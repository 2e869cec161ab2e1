"""An importance matrix: how strongly a model uses each input of each weight matrix.

For every column of a matrix it holds the mean square of what is multiplied with that column. A quantizer
that knows it keeps the columns that matter and lets the others go: the error it minimizes is then that of
the output, not that of the weights.

The file is llama.cpp's own (GGUF, `general.type` = "imatrix"; tools/imatrix), so matrices made by its tools
are read here, and its quantizer reads ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alight.errors import BadInput, InvalidModelFile, Unsupported
from alight.gguf import GGUFHeader, Tensor, read_header
from alight_converters.quantize.activations import observe
from alight_converters.quantize.files import appearing

if TYPE_CHECKING:  # torch is slow to import, and the quantizer's process only reads files
    import torch

    from alight_converters.calibration import Calibration
    from alight_converters.checkpoint import Checkpoint
    from alight_converters.passes import Progress

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Imatrix:
    """Squared inputs of a model's matrices, by GGUF tensor name ("blk.0.attn_q.weight").

    Attributes:
        sums: sum of squared inputs, shape (experts, columns), float32; one "expert" in a dense matrix.
        counts: tokens that were summed, shape (experts,).
        datasets: where the text came from.
        chunks, chunk_size: how many rows of how many tokens it was computed on.
    """

    sums: Mapping[str, NDArray[np.float32]]
    counts: Mapping[str, NDArray[np.float32]]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0

    def mean(self, name: str) -> NDArray[np.float32]:
        """Mean squared input per column, shape (experts * columns,). All ones for an expert that saw no token."""
        sums, counts = self.sums[name], self.counts[name][:, None]
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), 1)
        return np.ascontiguousarray(mean, np.float32).reshape(-1)

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Raises BadInput where this was not made of the model that has these tensors."""
        shapes = {t.name: t.shape for t in tensors}
        hint = "Make one from this very checkpoint: alight_converters.quantize.imatrix.collect."
        for name, sums in self.sums.items():
            if name not in shapes:
                raise BadInput(
                    f"the importance matrix is of another model: it has {name}, the model has not", hint=hint
                )
            columns = shapes[name][0] * (shapes[name][2] if len(shapes[name]) > 2 else 1)
            if sums.size != columns:
                raise BadInput(
                    f"the importance matrix is of another model: {name} has {columns} columns, "
                    f"the matrix {sums.size}",
                    hint=hint,
                )
        missing = _layers(shapes) - _layers(self.sums)
        if missing:
            raise BadInput(
                f"the importance matrix is of another model: it lacks layer {min(missing)} "
                f"and {len(missing) - 1} more",
                hint=hint,
            )

    def save(self, path: Path) -> Path:
        """Write llama.cpp's file; it appears at `path` when it is complete."""
        import gguf

        with appearing(path) as part:
            writer = gguf.GGUFWriter(part, "imatrix")
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", list(self.datasets) or ["unknown"])
            writer.add_uint32("imatrix.chunk_count", self.chunks)
            writer.add_uint32("imatrix.chunk_size", self.chunk_size)
            for name in sorted(self.sums):
                writer.add_tensor(name + _SUMS, self.sums[name])
                writer.add_tensor(name + _COUNTS, self.counts[name][:, None])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return path

    @classmethod
    def load(cls, path: Path) -> Imatrix:
        """Read a file of ours or of `llama-imatrix`.

        Raises:
            BadInput: no such file. InvalidModelFile: damaged, or not an importance matrix.
        """
        if not path.is_file():
            raise BadInput(f"there is no importance matrix at {path}")
        header = read_header(path)
        if header.metadata.get("general.type") != "imatrix":
            raise InvalidModelFile(
                f"{path.name} is a GGUF file, but not an importance matrix",
                hint="llama-imatrix writes one with `-o NAME.gguf`.",
            )
        return _read(path, header)


def collect(
    checkpoint: Checkpoint,
    calibration: Calibration,
    *,
    device: str = "cpu",
    batch: int = 1,
    progress: Progress | None = None,
) -> Imatrix:
    """Run calibration rows through a checkpoint and sum the squared inputs of its matrices.

    The output matrix is among them. Where it is tied to the embedding, its entry has the embedding's name,
    under which the quantizer meets it. Rows go through the model `batch` at a time.

    Raises:
        Unsupported: a family that alight does not know. InvalidModelFile: activations are not finite.
    """
    import torch

    model = checkpoint.load(device=device)
    sums: dict[str, torch.Tensor] = {}

    def see(name: str, inputs: torch.Tensor) -> None:
        squares = inputs.float().square().sum(0, dtype=torch.float64)
        sums[name] = sums[name] + squares if name in sums else squares

    matrices = matrix_names(checkpoint)
    head = matrices.pop(checkpoint.family.head)
    observe(model, matrices, see, calibration, head=head, batch=batch, progress=progress)
    return _imatrix(sums, calibration)


def matrix_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Module -> GGUF name of its weight, for all matrices: those in the layers, and the head.

    A tied head has the embedding's name, under which the quantizer meets it.
    """
    family = checkpoint.family
    found = {}
    for name, shape in checkpoint.shapes.items():
        module, _, part = name.rpartition(".")
        if module.startswith(family.layers + ".") and part == "weight" and len(shape) == 2:
            layer, _, role = module.removeprefix(family.layers + ".").partition(".")
            if role not in family.gguf_modules:
                raise Unsupported(f"alight has no GGUF name for {module} of {family.name}")
            found[module] = f"blk.{layer}.{family.gguf_modules[role]}.weight"
    tied = checkpoint.full_config.get("tie_word_embeddings", False)
    return found | {family.head: "token_embd.weight" if tied else "output.weight"}


def _imatrix(sums: Mapping[str, torch.Tensor], calibration: Calibration) -> Imatrix:
    for name, values in sums.items():
        if not values.isfinite().all():
            raise InvalidModelFile(
                f"the inputs of {name} are not finite", hint="The checkpoint is damaged, or overflows."
            )
    return Imatrix(
        sums={name: values.float().cpu().numpy()[None] for name, values in sums.items()},
        counts={name: np.array([calibration.tokens], np.float32) for name in sums},
        datasets=(calibration.origin,),
        chunks=len(calibration.rows),
        chunk_size=calibration.rows.shape[1],
    )


def _read(path: Path, header: GGUFHeader) -> Imatrix:
    import gguf

    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names:
        raise InvalidModelFile(f"{path.name} is an importance matrix without entries")
    sums, counts = {}, {}
    for name in names:
        if name + _COUNTS not in tensors:
            raise InvalidModelFile(f"{path.name} has no {name + _COUNTS}")
        counts[name] = np.array(tensors[name + _COUNTS], np.float32).reshape(-1)
        values = np.array(tensors[name + _SUMS], np.float32)
        if not counts[name].size or values.size % counts[name].size:
            raise InvalidModelFile(
                f"{path.name}: {name} has {values.size} sums and {counts[name].size} counts"
            )
        sums[name] = values.reshape(counts[name].size, -1)
        if not (np.isfinite(sums[name]).all() and (sums[name] >= 0).all() and (counts[name] >= 0).all()):
            raise InvalidModelFile(f"{path.name}: {name} has negative or infinite entries")
    metadata = header.metadata
    return Imatrix(
        sums,
        counts,
        tuple(metadata.get("imatrix.datasets", ())),
        int(metadata.get("imatrix.chunk_count", 0)),
        int(metadata.get("imatrix.chunk_size", 0)),
    )


def _layers(names: Mapping[str, object]) -> set[int]:
    return {int(found[1]) for name in names if (found := _LAYER.match(name))}
