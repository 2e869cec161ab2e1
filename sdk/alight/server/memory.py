"""How much memory a model will take, and how much there is for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil

from alight import planner
from alight.artifact import Artifact
from alight.devices import cgroup
from alight.errors import DoesNotFit, InvalidModelFile
from alight.exported import MARKS, read_exported
from alight.gguf import read_header
from alight.shape import Matrix
from alight.target import LoadOptions


def needed(artifact: Artifact, options: LoadOptions) -> int:
    """Bytes that the artifact is predicted to take once loaded, with the whole of its context."""
    shape = _shape(artifact)
    extras = [options.draft, options.projector or artifact.projector, *(path for _, path in options.adapters)]
    more = sum(_size(Path(path)) for path in extras if path)
    if shape is None:  # a format whose parts we cannot tell apart
        return artifact.size + planner.RUNTIME_BYTES + more
    context = options.context or min(
        planner.DEFAULT_CONTEXT, shape.trained_context or planner.DEFAULT_CONTEXT
    )
    return planner.memory(shape, context=context, kv_type=options.kv_type).total + more


def wished(artifact: Artifact, options: LoadOptions, context: int) -> LoadOptions:
    """The options with a larger context, but not beyond what the model was trained for."""
    shape = _shape(artifact)
    trained = shape.trained_context if shape else 0
    usual = options.context or min(planner.DEFAULT_CONTEXT, trained or planner.DEFAULT_CONTEXT)
    context = min(context, trained) if trained else context
    return replace(options, context=context) if context > usual else options


def fitted(artifact: Artifact, options: LoadOptions, free: int) -> LoadOptions:
    """The options with a context so small that the model fits into `free` bytes, if it may be chosen.

    Raises:
        DoesNotFit: with the numbers.
    """
    shape = _shape(artifact)
    if shape is None:
        raise DoesNotFit(f"model {artifact.name!r}", needed(artifact, options), free)
    context = planner.fit_context(shape, options.context, free, kv_type=options.kv_type)
    return replace(options, context=context)


def free(limit: int | None, taken: int, mapped: int) -> int:
    """Bytes that the next model may take.

    Args:
        limit: what all models may take together; None leaves that to the machine.
        taken: what the loaded ones were predicted to take.
        mapped: the part of it that is mapped files. The kernel calls that available, since it could drop
            it; but a model is read as a whole for every token, so it must stay.
    """
    found = [psutil.virtual_memory().available - mapped]
    if group := cgroup.memory_limit():
        found += [group.available_bytes, group.total_bytes - taken]
    if limit is not None:
        found.append(limit - taken)
    return max(min(found), 0)


def fits(bytes_needed: int, bytes_free: int) -> bool:
    """Whether a model fits, with a little left for what nobody can predict."""
    return bytes_needed <= bytes_free * (1 - planner.RESERVE)


def _shape(artifact: Artifact) -> planner.Shape | None:
    try:
        if artifact.format in MARKS:
            return _shape_of_exported(artifact)
        if artifact.format != "gguf":
            return None
        return planner.shape_of_gguf([read_header(file) for file in artifact.weights])
    except InvalidModelFile:  # the target says what is wrong with it
        return None


def _shape_of_exported(artifact: Artifact) -> planner.Shape | None:
    """All weights as one matrix of bytes: only what they take together is known."""
    about = read_exported(artifact.files)
    if not about.layers or not about.kv_width:
        return None
    return planner.Shape(
        architecture=about.architecture,
        layers=about.layers,
        hidden=about.hidden,
        ffn=0,
        group=1,
        kv_width=2 * about.kv_width,  # in float32, where llama.cpp keeps float16
        vocabulary=about.vocabulary,
        trained_context=about.trained_context,
        tied=True,
        tensors=(Matrix("weights", artifact.size, 1, "I8"),),
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
