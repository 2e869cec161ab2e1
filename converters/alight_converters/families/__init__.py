"""Model families: what differs between Llama, Qwen, Gemma and the others, one small file each.

A family says where a layer's parts are in a checkpoint, and what a GGUF file calls them. All of them share
the shape of a decoder: embedding, layers of attention and feed-forward network, final norm, head.
docs/add-a-family.md shows how to add one.
"""

from __future__ import annotations

from alight.errors import Unsupported
from alight_converters.families import gemma, granite, internlm2, llama, mistral, phi3, qwen2, qwen3
from alight_converters.families.family import Config, Family
from alight_converters.families.foreign import Foreign

__all__ = ["Family", "Foreign", "family_of", "family_of_gguf", "foreign", "known"]

_FAMILIES = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma.GEMMA2,
    gemma.GEMMA3,
    phi3.FAMILY,
    granite.FAMILY,
)
_FOREIGN = (internlm2.INTERNLM2, gemma.GEMMA3_WITH_VISION)


def known() -> dict[str, Family]:
    """All families by `model_type`, as `config.json` spells it."""
    return {kind: family for family in _FAMILIES for kind in family.model_types}


def foreign(config: Config) -> Foreign | None:
    """How to rewrite a checkpoint of this config as one of our families, if that is needed."""
    return next((f for f in _FOREIGN if f.model_type == config.get("model_type")), None)


def family_of(config: Config) -> Family:
    """The family of a config.

    Raises:
        Unsupported: alight has no family for its `model_type`.
    """
    kind = str(config.get("model_type", ""))
    families = known()
    if kind in families:
        return families[kind]
    if foreign(config):
        raise Unsupported(
            f"a {kind} checkpoint has to be rewritten first",
            hint="alight_converters.sources.open_source does it.",
        )
    raise _unknown("model_type", kind, families)


def family_of_gguf(architecture: str) -> Family:
    """The family that a GGUF of this architecture is read as. (Of those that share one, the first.)

    Raises:
        Unsupported: alight has no family for it.
    """
    families = {family.gguf: family for family in reversed(_FAMILIES)}
    if architecture not in families:
        raise _unknown("GGUF architecture", architecture, families)
    return families[architecture]


def _unknown(what: str, kind: str, families: dict[str, Family]) -> Unsupported:
    return Unsupported(
        f"{what} {kind!r} is not a family that alight knows",
        hint=f"Known: {', '.join(sorted(families))}. docs/add-a-family.md says how to add one.",
    )
