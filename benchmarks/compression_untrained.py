"""The forms of Q4_0 without training, by alight's own passes and quantizer, to compare trained ones with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.gguf import export
from alight_converters.passes import Context
from alight_converters.quantize.awq import Awq
from alight_converters.quantize.gguf import quantize
from alight_converters.quantize.imatrix import collect

FORMS = ("rounded", "imatrix", "awq", "awq+imatrix")
ON_GRID = {"token_embd.weight": "Q8_0"}  # QAT to q4_0 trains the embedding, which is the head, at Q8_0


def untrained(
    checkpoint: Checkpoint,
    rows: Calibration,
    folder: Path,
    forms: Sequence[str] = FORMS,
    *,
    device: str = "cpu",
) -> Iterator[tuple[str, Path]]:
    """Each form as a GGUF in `folder`, which is removed when the next one is asked for."""
    for scales in (False, True):
        wanted = [form for form in FORMS if form in forms and form.startswith("awq") == scales]
        if not wanted:
            continue
        if scales:
            context = Context(folder / "awq", folder / "work", checkpoint, rows, device=device)
            checkpoint = Awq().run(checkpoint, context)
        (source,) = export(checkpoint, folder / "source.gguf", "F32", shard=0)
        for form in wanted:
            matrix = collect(checkpoint, rows, device=device) if form.endswith("imatrix") else None
            made = quantize(source, folder / f"{form}.gguf", "Q4_0", imatrix=matrix, tensor_types=ON_GRID)
            yield form, made
            made.unlink()
        source.unlink()
