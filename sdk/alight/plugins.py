"""Find targets, builders, passes and exporters by entry point: ours and other people's register the same way.

[project.entry-points."alight.targets"]
my-board = "my_package:MyTarget"
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from alight.errors import BadInput, TargetUnavailable, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from alight.artifact import Artifact
    from alight.target import Target

log = logging.getLogger(__name__)

TARGETS = "alight.targets"
BUILDERS = "alight.builders"
RECIPES = "alight.recipes"
PASSES = "alight.passes"
EXPORTERS = "alight.exporters"


def targets() -> dict[str, Target]:
    """All registered targets by name. One that does not import is left out of automatic choice, with a log line."""
    return {name: found() for name, found in _load_all(TARGETS).items()}


def target(name: str) -> Target:
    """One target by name.

    Raises:
        BadInput: no such target is registered. TargetUnavailable: it is, but does not import.
    """
    found: Target = _load_one(TARGETS, name, "target")()
    return found


def choose_target(artifact: Artifact) -> Target:
    """The first target here that reads the artifact's format, in the order they are registered.

    Raises:
        TargetUnavailable: none does; says what each one lacks.
    """
    reasons = []
    for candidate in targets().values():
        if artifact.format in candidate.formats and candidate.automatic:
            state = candidate.probe()
            if state.here:
                return candidate
            reasons.append(f"{candidate.name}: {state.reason}. {state.install}".strip())
    why = "; ".join(reasons) or "no target reads this format"
    raise TargetUnavailable(f"nothing here can load {artifact.name!r} ({artifact.format}): {why}")


def builder(name: str) -> Any:
    """The builder of an artifact format, from the converters."""
    return _load_one(BUILDERS, name, "format")()


def recipes() -> Any:
    """What runs recipe files, from the converters."""
    return _load_one(RECIPES, "yaml", "recipe runner")()


def find(group: str, name: str, what: str) -> Any:
    """What is registered under `name` in a group: the class of a pass or of an exporter.

    Raises:
        BadInput: nothing is; says what is, calling it a `what`. TargetUnavailable: it does not import.
    """
    return _load_one(group, name, what)


def names(group: str) -> list[str]:
    """What is registered in a group."""
    return sorted(_entries(group))


def version(group: str, name: str) -> str:
    """The version of the distribution that registers `name`; empty where nothing does."""
    entry = _entries(group).get(name)
    return f"{entry.dist.name} {entry.dist.version}" if entry and entry.dist else ""


def _entries(group: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # slow to import, and only needed to load a model

    return {e.name: e for e in entry_points(group=group)}


def _load_all(group: str) -> dict[str, Any]:
    found = {}
    for name, entry in _entries(group).items():
        try:
            found[name] = entry.load()
        except ImportError as error:
            log.warning("plugin %s (%s) does not import: %s", name, entry.value, error)
    return found


def _load_one(group: str, name: str, what: str) -> Any:
    entries = _entries(group)
    if name not in entries:
        near = nearest(name, entries)
        hint = (
            f"Did you mean {' or '.join(near)}?"
            if near
            else f"Known: {', '.join(sorted(entries)) or 'none'}."
        )
        raise BadInput(f"unknown {what} {name!r}", hint=hint)
    try:
        return entries[name].load()
    except ImportError as error:
        raise TargetUnavailable(f"{what} {name!r} does not import: {error}") from error
