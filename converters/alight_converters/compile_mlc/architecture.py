"""What a decoder is made of, as far as the families differ. Read from `mlc-chat-config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alight.errors import BadInput, InvalidModelFile, Unsupported

Config = Mapping[str, Any]
MODES = ("q0f16", "q0f32", "q4f16_1", "q4f32_1")


@dataclass(frozen=True)
class Quantization:
    """A mode of MLC: `name` is as mlc_llm spells it, `dtype` that of norms, scales, embeddings and the KV cache."""

    name: str
    dtype: str
    four_bits: bool

    @classmethod
    def of(cls, name: str) -> Quantization:
        """Raises BadInput for an unknown mode."""
        if name not in MODES:
            raise BadInput(f"MLC mode {name!r} cannot be compiled", hint=f"Use one of {', '.join(MODES)}.")
        return cls(name, "float16" if "f16" in name else "float32", name.startswith("q4"))


@dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    Attributes:
        frequencies: radians per position, one for each rotated pair of a head.
        factor: of sine and cosine (longrope's attention factor).
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0

    @classmethod
    def plain(cls, base: float, width: int, stretch: float = 1.0) -> Rope:
        """The original one (Su et al., arXiv:2104.09864), its positions divided by `stretch`."""
        return cls(tuple(base ** (-2 * i / width) / stretch for i in range(width // 2)))

    @classmethod
    def llama3(cls, base: float, width: int, scaling: Config) -> Rope:
        """Llama 3.1's: slow frequencies divided by a factor, fast ones kept, those between blended."""
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        found = []
        for frequency in cls.plain(base, width).frequencies:
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
            kept = min(1.0, max(0.0, (turns - low) / (high - low)))
            found.append(frequency * (kept + (1 - kept) / scaling["factor"]))
        return cls(tuple(found))

    @classmethod
    def longrope(
        cls, base: float, width: int, scaling: Config, original: int, trained: int, context: int
    ) -> Rope:
        """Phi-3's (Ding et al., arXiv:2402.13753). A library has one context, and so one of the two tables:
        transformers changes tables in the middle of a conversation, where the cached keys no longer fit."""
        divisors = scaling["long_factor" if context > original else "short_factor"]
        stretch = trained / original
        factor = scaling.get("attention_factor")
        if factor is None:
            factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        plain = cls.plain(base, width).frequencies
        return cls(tuple(f / d for f, d in zip(plain, divisors, strict=True)), factor)


@dataclass(frozen=True)
class Architecture:
    """One decoder.

    Attributes:
        heads, kv_heads, head: their numbers, and the width of one.
        ropes: by layer; layers that share one share its tables.
        windows: by layer, tokens that its attention looks back, itself counted; None is all.
        attention_scale: what the products of queries and keys are multiplied by.
        activation: "silu" or "gelu_tanh".
        fused_qkv: queries, keys and values are one matrix.
        qkv_bias, output_bias: of the attention's matrices.
        head_norms: queries and keys are normalized head by head.
        sandwich_norms: attention and MLP are normalized once more at their ends.
        embedding_scale: of the embeddings.
        attention_softcap, final_softcap: of attention scores and logits; 0 is none.
        names: part of our names of parameters -> what stands there in MLC.
        prefix: before all of MLC's names.
        model_type: MLC's name of the family.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    epsilon: float
    tied: bool
    ropes: tuple[Rope, ...]
    windows: tuple[int | None, ...]
    attention_scale: float
    activation: str = "silu"
    fused_qkv: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    head_norms: bool = False
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    model_type: str = ""

    def mlc_name(self, ours: str) -> str:
        """MLC's name of a parameter."""
        for part, theirs in self.names.items():
            ours = ours.replace(part, theirs)
        return self.prefix + ours

    @property
    def window(self) -> int | None:
        """Of the layers that have one; they all have the same."""
        return next((window for window in self.windows if window is not None), None)


def llama_like(config: Config, *, rope: Rope | None = None, **different: Any) -> Architecture:
    """The architecture of a config whose family is a Llama but for `different`.

    Raises:
        InvalidModelFile: a size is missing. Unsupported: a rope scaling that the family is not known to have.
    """
    try:
        hidden, heads, layers = (
            config["hidden_size"],
            config["num_attention_heads"],
            config["num_hidden_layers"],
        )
        width = config.get("head_dim") or hidden // heads
        scaling = config.get("rope_scaling")
        if rope is None:
            if scaling:
                kind = scaling.get("rope_type") or scaling.get("type")
                raise Unsupported(f"rope scaling {kind!r} cannot be compiled", hint="Use another format.")
            rope = Rope.plain(rope_base(config), width)
        sizes: dict[str, Any] = {
            "hidden": hidden,
            "intermediate": config["intermediate_size"],
            "layers": layers,
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head": width,
            "vocabulary": config["vocab_size"],
            "epsilon": config["rms_norm_eps"],
            "tied": bool(config.get("tie_word_embeddings")),
            "ropes": (rope,) * layers,
            "windows": (None,) * layers,
            "attention_scale": width**-0.5,
        }
    except KeyError as error:
        raise InvalidModelFile(
            f"mlc-chat-config.json says nothing of {error}", hint="Export the model again."
        ) from error
    return Architecture(**(sizes | different))


def rope_base(config: Config) -> float:
    """The base of the rotary embedding, under either of its names."""
    base = config.get("position_embedding_base") or config.get("rope_theta")
    if not base:
        raise InvalidModelFile("mlc-chat-config.json has no rope_theta", hint="Export the model again.")
    return float(base)
