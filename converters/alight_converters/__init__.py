"""From a model to the artifact a device can hold: prune, distil, quantize, evaluate, choose.

torch lives here and nowhere else in alight, and only in the modules that need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alight_converters.recipe import Recipe

__all__ = ["Recipe"]


def __getattr__(name: str) -> Any:
    if name == "Recipe":  # it imports torch, which quantizing a GGUF does not need
        from alight_converters.recipe import Recipe

        return Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
