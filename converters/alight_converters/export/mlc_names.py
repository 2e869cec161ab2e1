"""What MLC calls the tensors of each family, and which of ours it holds as one.

The names are mlc_llm's (python/mlc_llm/model/*/*_loader.py): a library compiled by either project finds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from alight.errors import Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.families import Family

_GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, slots=True)
class Naming:
    """How a family is called in MLC.

    Attributes:
        model_type: of the whole model, in `mlc-chat-config.json`.
        fused: module of MLC -> ours, whose rows it holds one below the other. All are below a layer.
        renamed: part of our names -> what stands there in MLC.
        prefix: before every name.
        biased: modules of MLC that may have a bias.
        own_head: whether the head may have weights of its own.
    """

    model_type: str
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    biased: tuple[str, ...] = ()
    own_head: bool = True

    def name(self, ours: str) -> str:
        """MLC's name of a tensor that is not fused."""
        for part, theirs in self.renamed.items():
            ours = ours.replace(part, theirs)
        return self.prefix + ours


# Mistral without its window is a Llama, and of the two only MLC's Llama may share embedding and head.
_LLAMA = Naming("llama", _GATE_UP | {"self_attn.qkv_proj": _QKV})
NAMINGS: Mapping[str, Naming] = MappingProxyType({
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Naming("qwen2", _GATE_UP | {"self_attn.c_attn": _QKV}, biased=("self_attn.c_attn",)),
    "qwen3": Naming("qwen3", _GATE_UP | {"self_attn.c_attn": _QKV}, biased=("self_attn.c_attn", "self_attn.o_proj")),
    "gemma2": Naming("gemma2", _GATE_UP | {"self_attn.qkv_proj": _QKV}, own_head=False),
    "gemma3_text": Naming("gemma3_text", _GATE_UP, prefix="language_model.", own_head=False),
    "phi3": Naming("phi3", renamed={
        "model.layers.": "transformer.h.",
        "model.embed_tokens.": "transformer.embd.",
        "model.norm.": "transformer.norm.",
        ".input_layernorm.": ".ln.",
        ".self_attn.qkv_proj.": ".mixer.qkv_proj.",
        ".self_attn.o_proj.": ".mixer.out_proj.",
    }),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor of MLC before quantization.

    Attributes:
        sources: tensors of the checkpoint, whose rows it holds one below the other.
        offset: added to the values. MLC wants Gemma's norms whole, which the checkpoint stores less 1. (mlc_llm adds
            it in the checkpoint's type, which rounds norms in bfloat16. Here it is added in float32.)
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    offset: float = 0.0


def naming_of(checkpoint: Checkpoint) -> Naming:
    """Raises Unsupported for a family that MLC has no model of."""
    model_type = str(checkpoint.config["model_type"])
    if model_type not in NAMINGS:
        raise Unsupported(
            f"alight cannot export {checkpoint.family.name} for MLC",
            hint=f"It can export {', '.join(sorted(NAMINGS))}. Use another format, such as GGUF.",
        )
    return NAMINGS[model_type]


def parameters(checkpoint: Checkpoint) -> list[Parameter]:
    """All tensors of a checkpoint as MLC has them, in the order in which mlc_llm writes them.

    Raises:
        Unsupported: MLC has no such family, or no place for one of the tensors.
    """
    family, shapes = checkpoint.family, checkpoint.shapes
    naming = naming_of(checkpoint)
    tied = bool(checkpoint.full_config["tie_word_embeddings"])
    if not tied and not naming.own_head:
        raise _no_place(family, f"{family.head}.weight")
    found: dict[str, Parameter] = {}
    for ours in sorted(shapes):
        if ours.endswith("rotary_emb.inv_freq") or (tied and ours.startswith(f"{family.head}.")):
            continue
        name, sources = _fused(naming, ours)
        if name.endswith(".bias") and not name.removesuffix(".bias").endswith(naming.biased):
            raise _no_place(family, ours)
        rows = sum(shapes[source][0] for source in sources)
        shape = (rows, *shapes[ours][1:])
        offset = family.norm_offset if len(shape) == 1 else 0.0  # Gemma's only vectors are norms
        found.setdefault(name, Parameter(name, shape, sources, offset))
    return list(found.values())


def count(parameters: list[Parameter]) -> int:
    """Number of weights."""
    return sum(math.prod(p.shape) for p in parameters)


def _fused(naming: Naming, ours: str) -> tuple[str, tuple[str, ...]]:
    """MLC's name for what holds one of our tensors, and all of ours that are in it."""
    path, _, kind = ours.rpartition(".")
    for module, parts in naming.fused.items():
        for part in parts:
            if path.endswith(f".{part}"):
                layer = path.removesuffix(part)
                return naming.name(f"{layer}{module}.{kind}"), tuple(f"{layer}{p}.{kind}" for p in parts)
    return naming.name(ours), (ours,)


def _no_place(family: Family, tensor: str) -> Unsupported:
    return Unsupported(
        f"MLC's {family.name} has no place for tensor {tensor!r}",
        hint="Use another format, such as GGUF or ONNX.",
    )
