"""Put what was built into the store, and beside it as a plain folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from alight.artifact import REPORT, REPORT_PAGE, SOURCE, Artifact, Description, digest_of, files_below
from alight.blobs import disk_full_is_ours, hash_file
from alight.gguf import read_header
from alight.store import Store
from alight_converters import report

WEIGHTS = "model.gguf"  # a GGUF's name inside its artifact


def keep(
    name: str, made: Path, data: dict[str, Any], folder: Path, *, source: Artifact, quantization: str = ""
) -> Artifact:
    """Put a GGUF, or the folder of another format, with its report and the source's licence into the store.

    Args:
        data: the report. folder: where it may be written.
        quantization: of what does not tell it.
    """
    texts = {REPORT: report.to_json(data), REPORT_PAGE: report.to_html(data)}
    for path, text in texts.items():
        (folder / path).write_text(text, encoding="utf-8")
    extra = {path: f for path, f in source.files.items() if path.lower().startswith(("license", "licence"))}
    files = {WEIGHTS: made} if made.is_file() else files_below(made)
    return Store().add(
        name,
        {**extra, **files, **{path: folder / path for path in texts}},
        _describe(files, source.description, name, quantization),
        lineage=lineage_of(source),
        annotations={SOURCE: source.annotations.get(SOURCE, source.name)},
    )


def _describe(files: dict[str, Path], source: Description, name: str, quantization: str) -> Description:
    if WEIGHTS in files:
        return Description.of_gguf(read_header(files[WEIGHTS]), licence=source.licence, title=name)
    told = Description.of_folder(files, licence=source.licence, title=name)
    return replace(
        told,
        parameters=told.parameters or source.parameters,
        quantization=told.quantization or quantization,
    )


def lineage_of(source: Artifact) -> str:
    """What its forms have in common: for a model in no store, what the store would give it."""
    if source.lineage:
        return source.lineage
    digests = [hash_file(file) for file in source.weights]
    return digests[0] if len(digests) == 1 else digest_of("\n".join(digests).encode())


def write_folder(artifact: Artifact, folder: Path | None) -> None:
    """Lay an artifact's files out in a plain folder of copies, which appears when it is complete."""
    if folder is None:
        return
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with disk_full_is_ours(folder.parent):
            for path, blob in artifact.files.items():
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(blob, part / path)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
