"""Gemma 3's text model: head norms, and two rotary embeddings, of layers with a window and without."""

from __future__ import annotations

from alight.errors import Unsupported
from alight_converters.compile_mlc.architecture import Architecture, Config, Rope, llama_like, rope_base
from alight_converters.compile_mlc.families.gemma2 import shared, windows

_PATTERN = 6  # every sixth layer has no window
_LOCAL_BASE = 10000.0  # of all published models


def architecture(config: Config, context: int) -> Architecture:
    """See `architecture_of`."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise Unsupported(f"rope scaling {kind!r} cannot be compiled", hint="Use another format.")
    stretch = scaling.get("factor", 1.0) if kind == "linear" else 1.0
    whole = Rope.plain(rope_base(config), config["head_dim"], stretch)
    local = Rope.plain(config.get("rope_local_base_freq") or _LOCAL_BASE, config["head_dim"])
    # The rope goes by the kind of layer, also where a small context makes its window do nothing.
    local_layers = windows(config, 1 << 60, _PATTERN)
    return llama_like(
        config,
        rope=whole,
        ropes=tuple(whole if window is None else local for window in local_layers),
        windows=windows(config, context, _PATTERN),
        head_norms=True,
        fused_qkv=False,
        prefix="language_model.",
        **shared(config),
    )
