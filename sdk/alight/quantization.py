"""Quantization types, and what llama.cpp's quantizer makes of a model at each.

The quantizer does not give all tensors one type: it keeps the sensitive ones better, by rules of its own. They are
told here again (llama.cpp, src/llama-quant.cpp), so that sizes are known before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from alight.errors import BadInput, nearest
from alight.gguf import TYPES
from alight.shape import Matrix, Shape

FLOATS = ("F32", "F16", "BF16")

_BLOCK = {name: block for name, block, _ in TYPES.values()}

# What is taken where the columns are no multiple of a type's block. Where this does not fit either: F16.
_FALLBACK = {
    "Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ2_XS": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ1_S": "IQ4_NL",
}  # fmt: skip

# -- the rules ---------------------------------------------------------------------------------------

# What a tensor does, by the last word of its name: in GGUF, on Hugging Face, in InternLM2 and Mixtral.
_ROLES = {
    "embedding": ("token_embd", "embed_tokens", "tok_embeddings"),
    "output": ("output", "lm_head"),
    # InternLM2's one matrix is cut up by the export, and most of it is queries.
    "query": ("attn_q", "q_proj", "wqkv"),
    "key": ("attn_k", "k_proj"),
    # One matrix of queries, keys and values is treated as the values are.
    "value": ("attn_v", "v_proj", "attn_qkv", "qkv_proj"),
    "attention": ("attn_output", "o_proj", "wo"),
    "gate": ("ffn_gate", "gate_proj", "w1"),
    "up": ("ffn_up", "up_proj", "gate_up_proj", "w3"),
    "down": ("ffn_down", "down_proj", "w2"),
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words}
_LAYER = re.compile(r"(?:blk|layers)\.(\d+)\.")

Layers = Callable[[int, int], bool]  # (number of a layer, how many there are)


def _all(_layer: int, _layers: int) -> bool:
    return True


def _eighth(layer: int, layers: int) -> bool:
    return layer < layers // 8


def _sixteenth(layer: int, layers: int) -> bool:
    return layer < layers // 16


def _middle(layer: int, layers: int) -> bool:
    return layers // 8 <= layer < 7 * layers // 8


def _spread(layer: int, layers: int) -> bool:
    return not _middle(layer, layers) or (layer - layers // 8) % 3 == 2


def _two(layer: int, _layers: int) -> bool:
    return layer < 2


def _four(layer: int, _layers: int) -> bool:
    return layer < 4


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors that get another type than most.

    Attributes:
        roles: of `_ROLES`, with blanks between; "experts": all matrices of a mixture's experts.
        layers: where. grouped: only where at least four query heads share a key.
        imatrix: only with an importance matrix, or only without one; None: both.
    """

    roles: str
    type: str
    layers: Layers = _all
    grouped: bool = False
    imatrix: bool | None = None

    def fits(self, roles: set[str], layer: int, shape: Shape, imatrix: bool) -> bool:
        return (
            not roles.isdisjoint(self.roles.split())
            and self.layers(layer, shape.layers)
            and (shape.group >= 4 or not self.grouped)
            and self.imatrix in (None, imatrix)
        )


@dataclass(frozen=True, slots=True)
class QuantType:
    """A llama.cpp file type: the ggml type of most tensors, that of the output matrix (and of an embedding that
    serves as one), and the exceptions, of which the first that fits counts."""

    main: str
    output: str
    rules: tuple[Rule, ...] = ()


def _two_bits(main: str, *, value: str, embedding: str, attention: str) -> QuantType:
    """IQ1 and IQ2 follow one pattern."""
    return QuantType(main, "Q5_K", (
        Rule("value", "Q4_K", grouped=True), Rule("value", value), Rule("down", value, _eighth),
        Rule("embedding", embedding), Rule("attention", attention),
    ))  # fmt: skip


def _four_bits(main: str) -> QuantType:
    """IQ4 too."""
    return QuantType(main, "Q6_K", (
        Rule("value", "Q5_K", grouped=True), Rule("down", "Q5_K", _eighth, imatrix=False),
    ))  # fmt: skip


QUANT_TYPES: dict[str, QuantType] = {
    "F32": QuantType("F32", "F32"),
    "F16": QuantType("F16", "F16"),
    "BF16": QuantType("BF16", "BF16"),
    "Q8_0": QuantType("Q8_0", "Q8_0"),
    "Q6_K": QuantType("Q6_K", "Q6_K"),
    "Q5_K_M": QuantType("Q5_K", "Q6_K", (Rule("value down", "Q6_K", _spread),)),
    "Q5_K_S": QuantType("Q5_K", "Q6_K"),
    "Q5_1": QuantType("Q5_1", "Q6_K"),
    "Q5_0": QuantType("Q5_0", "Q6_K", (Rule("down", "Q5_1", _eighth, imatrix=True),)),
    "Q4_K_M": QuantType("Q4_K", "Q6_K", (Rule("value down", "Q6_K", _spread),)),
    "Q4_K_S": QuantType("Q4_K", "Q6_K", (Rule("value", "Q5_K", _four), Rule("down", "Q5_K", _eighth))),
    "Q4_1": QuantType("Q4_1", "Q6_K"),
    "Q4_0": QuantType("Q4_0", "Q6_K", (Rule("down", "Q4_1", _eighth, imatrix=True),)),
    "IQ4_NL": _four_bits("IQ4_NL"),
    "IQ4_XS": _four_bits("IQ4_XS"),
    "MXFP4_MOE": QuantType("Q8_0", "Q8_0", (Rule("experts", "MXFP4"),)),
    "Q3_K_L": QuantType("Q3_K", "Q6_K", (Rule("value down attention", "Q5_K"),)),
    "Q3_K_M": QuantType("Q3_K", "Q6_K", (
        Rule("value", "Q5_K", _two), Rule("down", "Q5_K", _sixteenth), Rule("value down attention", "Q4_K"),
    )),
    "Q3_K_S": QuantType("Q3_K", "Q6_K"),
    "IQ3_M": QuantType("IQ3_S", "Q6_K", (
        Rule("value attention", "Q4_K"), Rule("down", "Q4_K", _eighth),
    )),
    "IQ3_S": QuantType("IQ3_S", "Q6_K", (Rule("value", "Q4_K", grouped=True),)),
    "IQ3_XS": QuantType("IQ3_S", "Q6_K", (
        Rule("value", "Q4_K", grouped=True), Rule("query key", "IQ3_XXS"), Rule("gate up", "IQ3_XXS", _middle),
    )),
    "IQ3_XXS": QuantType("IQ3_XXS", "Q5_K", (
        Rule("value", "Q4_K", grouped=True), Rule("query key", "IQ2_S"), Rule("attention embedding", "IQ3_S"),
    )),
    "Q2_K": QuantType("Q2_K", "Q6_K", (
        Rule("value", "Q4_K", grouped=True), Rule("value down attention", "Q3_K"),
    )),
    "Q2_K_S": QuantType("Q2_K", "Q6_K", (
        Rule("value", "Q4_K", grouped=True), Rule("down", "Q4_K", _eighth),
    )),
    "IQ2_M": _two_bits("IQ2_S", value="IQ3_S", embedding="IQ3_S", attention="IQ3_S"),
    "IQ2_S": _two_bits("IQ2_XS", value="IQ3_S", embedding="IQ3_S", attention="IQ3_S"),
    "IQ2_XS": _two_bits("IQ2_XS", value="Q2_K", embedding="Q2_K", attention="IQ2_XS"),
    "IQ2_XXS": _two_bits("IQ2_XXS", value="Q2_K", embedding="Q2_K", attention="IQ2_XXS"),
    "TQ2_0": QuantType("TQ2_0", "Q6_K", (Rule("embedding", "Q4_K"),)),
    "TQ1_0": QuantType("TQ1_0", "Q6_K", (Rule("embedding", "Q4_K"),)),
    "IQ1_M": _two_bits("IQ1_M", value="Q2_K", embedding="Q2_K", attention="IQ2_XXS"),
    "IQ1_S": _two_bits("IQ1_S", value="Q2_K", embedding="Q2_K", attention="IQ2_XXS"),
}  # fmt: skip

# Types of which llama.cpp refuses to round a tensor without knowing what matters in it.
_BLIND = {"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}


def takes_imatrix(kind: str) -> bool:
    """Whether llama.cpp's quantizer weighs errors by an importance matrix for this type."""
    return kind not in (*FLOATS, "Q8_0", "MXFP4_MOE", "TQ1_0", "TQ2_0")


def needs_imatrix(kind: str) -> bool:
    """Whether llama.cpp's quantizer refuses this type without an importance matrix."""
    found = QUANT_TYPES[kind]
    return kind == "Q2_K_S" or not _BLIND.isdisjoint({found.main, *(rule.type for rule in found.rules)})


def quant_type(name: str) -> str:
    """The canonical name of a quantization type ("q4_k_m" -> "Q4_K_M")."""
    if name.upper() not in QUANT_TYPES:
        near = nearest(name, QUANT_TYPES)
        raise BadInput(
            f"unknown quantization type {name!r}",
            hint=f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(QUANT_TYPES)}.",
        )
    return name.upper()


@dataclass(frozen=True, slots=True)
class Form:
    """A quantization type, with or without an importance matrix: "Q4_K_M" or "Q4_K_M+imatrix".

    Raises:
        BadInput: the type rounds every weight alike, so that it has no use for an importance matrix; or it cannot
        do without one.
    """

    type: str
    imatrix: bool = False

    def __post_init__(self) -> None:
        if self.imatrix and not takes_imatrix(self.type):
            raise BadInput(
                f"{self.type} has no use for an importance matrix",
                hint=f"Those that have: {', '.join(filter(takes_imatrix, QUANT_TYPES))}.",
            )
        if not self.imatrix and needs_imatrix(self.type):
            raise BadInput(
                f"{self.type} needs an importance matrix",
                hint=f"Ask for {self.type.lower()}+imatrix, or take a larger type, such as Q3_K_S.",
            )

    @property
    def name(self) -> str:
        return f"{self.type}+imatrix" if self.imatrix else self.type

    @classmethod
    def parse(cls, text: str) -> Form:
        """The form that people write as "q4_k_m" or "q4_k_m+imatrix"."""
        kind, plus, more = text.partition("+")
        if plus and more.lower() != "imatrix":
            raise BadInput(f"unknown form {text!r}", hint=f"Write it as {kind} or {kind}+imatrix.")
        return cls(quant_type(kind), bool(plus))


# -- a model at a type -------------------------------------------------------------------------------


def quantized(shape: Shape, name: str) -> Shape:
    """The same model as llama.cpp's quantizer would write it in a form ("Q4_K_M", "Q4_K_M+imatrix").

    Not told apart are sizes that llama.cpp knows by heart: it keeps attention better in a 70B Llama, and in mixtures
    of exactly eight experts.
    """
    form = Form.parse(name)
    return replace(shape, tensors=tuple(replace(t, type=_type(t, shape, form)) for t in shape.tensors))


def _type(t: Matrix, shape: Shape, form: Form) -> str:
    kind = QUANT_TYPES[form.type]
    if t.rows == 1 or "norm" in t.name or "gate_inp" in t.name:
        return "F32"
    if kind.main in FLOATS:
        return kind.main
    wanted = _wanted(t, shape, kind, form.imatrix)
    for candidate in (wanted, _FALLBACK.get(wanted, "F16")):
        if t.columns % _BLOCK[candidate] == 0:
            return candidate
    return "F16"


def role_of(name: str) -> str:
    """What a tensor does, by its name in GGUF or in a checkpoint; "" for one that is treated like most.

    One of "embedding", "output", "query", "key", "value", "attention", "gate", "up", "down".
    """
    path, _, _ = name.rpartition(".")
    word = path.rpartition(".")[2]
    return _ROLE_OF.get(word.removesuffix("_exps").removesuffix("_shexp"), "")


def _wanted(t: Matrix, shape: Shape, kind: QuantType, imatrix: bool) -> str:
    """The type that the rules give, before the columns are looked at."""
    roles = {role_of(t.name)}
    if roles == {"output"} or (roles == {"embedding"} and shape.tied):
        return kind.output if t.columns % _BLOCK[kind.main] == 0 else "Q8_0"
    if "_exps." in t.name or ".experts." in t.name:
        roles.add("experts")
    found = _LAYER.search(t.name)
    layer = int(found[1]) if found else 0
    return next((r.type for r in kind.rules if r.fits(roles, layer, shape, imatrix)), kind.main)
