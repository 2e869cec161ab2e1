"""Model families: what differs between Llama, Qwen, Gemma and the others, one small file each.

A family says where a layer's parts are in a checkpoint, and what a GGUF file calls them. All of them share
the shape of a decoder: embedding, layers of attention and feed-forward network, final norm, head.
docs/add-a-family.md shows how to add one.
"""

from __future__ import annotations

from typing import Any

from alight.errors import Unsupported
from alight_converters.families.family import Family

__all__ = ["Family", "family_of", "known"]


def known() -> dict[str, Family]:
    """All families by `model_type`, as `config.json` spells it."""
    from alight_converters.families import llama

    return {kind: family for family in (llama.FAMILY,) for kind in family.model_types}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.

    Raises:
        Unsupported: alight has no family for its `model_type`.
    """
    kind = str(config.get("model_type", ""))
    families = known()
    if kind not in families:
        raise Unsupported(
            f"model_type {kind!r} is not a family that alight knows",
            hint=f"Known: {', '.join(sorted(families))}. docs/add-a-family.md says how to add one.",
        )
    return families[kind]
