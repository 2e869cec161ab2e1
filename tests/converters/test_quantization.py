"""Quantization types: what alight says llama.cpp will make of a model is what its quantizer plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_writer import gguf

from alight import planner
from alight.errors import BadInput
from alight.gguf import FILE_TYPES, read_header
from alight.quantization import QUANT_TYPES, Form, needs_imatrix, quantized, takes_imatrix
from alight_converters.quantize.gguf import plan
from alight_converters.quantize.imatrix import Imatrix

F32, F16 = 0, 1
LAYERS, HIDDEN, FFN, KV, WORDS = 32, 256, 512, 64, 512
FORMS = [
    Form(k, i)
    for k in QUANT_TYPES
    for i in (False, True)
    if (takes_imatrix(k) if i else not needs_imatrix(k))
]


def write(file: Path, *, heads: int) -> Path:
    """A Llama whose columns all types divide, with an output matrix; its weights are a hole in the file."""
    wanted: dict[str, tuple[int, ...]] = {
        "token_embd": (HIDDEN, WORDS),
        "output": (HIDDEN, WORDS),
        "output_norm": (HIDDEN,),
    }
    for n in range(LAYERS):
        layer = {
            "attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN, KV), "attn_v": (HIDDEN, KV),
            "attn_output": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,), "ffn_gate": (HIDDEN, FFN), "ffn_up": (HIDDEN, FFN),
            "ffn_down": (FFN, HIDDEN),
        }  # fmt: skip
        wanted |= {f"blk.{n}.{name}": shape for name, shape in layer.items()}
    tensors, at = [], 0
    for name, shape in wanted.items():
        kind = F32 if len(shape) == 1 else F16
        tensors.append((f"{name}.weight", shape, kind, at))
        at += int(np.prod(shape)) * (4 if kind == F32 else 2)
    sizes = {
        "block_count": LAYERS, "context_length": 512, "embedding_length": HIDDEN, "feed_forward_length": FFN,
        "attention.head_count": heads, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": WORDS,
    }  # fmt: skip
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": "no_vocab"}
    header = gguf(metadata | {f"llama.{key}": value for key, value in sizes.items()}, tensors)
    with file.open("wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + at)
    return file


def check(file: Path, form: Form) -> None:
    header = read_header(file)
    matrices = [t for t in header.tensors if len(t.shape) == 2]
    ones = {t.name: np.ones((1, t.shape[0]), np.float32) for t in matrices}
    matrix = Imatrix(ones, {name: np.ones(1, np.float32) for name in ones}) if form.imatrix else None
    planned = plan(file, form.type, imatrix=matrix)
    predicted = quantized(planner.shape_of_gguf([header]), form.name)
    assert {t.name: t.type for t in predicted.tensors} == planned.types
    assert predicted.weight_bytes == planned.bytes


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_types_are_those_that_the_quantizer_plans(tmp_path: Path, form: Form) -> None:
    check(write(tmp_path / "x.gguf", heads=4), form)


@pytest.mark.parametrize("kind", ["IQ4_XS", "Q2_K", "IQ3_XXS+imatrix", "IQ2_M+imatrix", "IQ1_S+imatrix"])
def test_values_that_many_queries_share_are_kept_better(tmp_path: Path, kind: str) -> None:
    check(write(tmp_path / "x.gguf", heads=8), Form.parse(kind))


@pytest.mark.parametrize("kind", ["IQ4_XS", "Q4_K_M", "IQ2_XS+imatrix", "TQ2_0", "IQ3_S", "Q5_K_M+imatrix"])
def test_types_that_the_columns_of_real_weights_do_not_fit(smollm2_file: Path, kind: str) -> None:
    check(smollm2_file, Form.parse(kind))


def test_every_file_type_is_known() -> None:
    assert set(QUANT_TYPES) == set(FILE_TYPES.values())


def test_forms_that_cannot_be() -> None:
    for kind in ("F16", "BF16", "F32", "Q8_0", "TQ1_0"):
        with pytest.raises(BadInput, match=f"{kind} has no use for an importance matrix"):
            Form.parse(f"{kind}+imatrix")
    for kind in ("iq1_s", "IQ2_XXS", "IQ3_XS", "Q2_K_S"):
        with pytest.raises(BadInput, match=f"{kind.upper()} needs an importance matrix") as caught:
            Form.parse(kind)
        assert f"{kind.lower()}+imatrix" in caught.value.hint
