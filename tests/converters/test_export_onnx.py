"""Exported decoders compute what transformers computes, for every family and kind of rope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import tiny_tokenizers
import torch
from gguf_scores import kl, reference
from onnx_scores import genai_greedy, genai_logits, log_probabilities
from transformers import PretrainedConfig

from alight.errors import BadInput, InvalidModelFile, Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.export import onnx
from alight_converters.export.onnx import Precision
from alight_converters.passes import Context
from alight_converters.prune.depth import PruneDepth
from alight_converters.prune.width import PruneWidth

FP32 = Precision("fp32")
TOKENS = [int(t) for t in np.random.default_rng(0).integers(2, 500, 72)]


def _more() -> dict[str, PretrainedConfig]:
    """What the builder gets wrong when it is left to itself."""
    config, rope = tiny_checkpoints.family_config, tiny_checkpoints._rope
    longrope = {
        "long_factor": [1.0 + 0.5 * n for n in range(6)],
        "short_factor": [1.0 + 0.1 * n for n in range(6)],
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
    }
    long = {"original_max_position_embeddings": 32, "pad_token_id": None}
    return {
        "mistral-window": config("mistral", sliding_window=16),
        "phi3-window": config("phi3", sliding_window=16, pad_token_id=None),
        "phi3-longrope": config("phi3", **long, **rope("longrope", **longrope)),
        "qwen2-window": config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2),
        "qwen3-odd-heads": config("qwen3", attention_bias=True, head_dim=24),
        "llama-mlp-bias": config("llama", mlp_bias=True, hidden_act="gelu_pytorch_tanh"),
        "llama-dynamic": config("llama", **rope("dynamic", factor=2.0)),
        "gemma2-odd-width": tiny_checkpoints._gemma("gemma2", hidden_size=80),
        "gemma3-bf16": tiny_checkpoints.families()["gemma3"][0],  # 1 + norm is to be computed in float32
        "granite-tied": config("granite", tie_word_embeddings=True, logits_scaling=3.0, embedding_multiplier=7.0),
    }  # fmt: skip


def _families() -> dict[str, tuple[PretrainedConfig, dict[str, Any]]]:
    plain = tiny_tokenizers.byte_level("gpt-2")
    return tiny_checkpoints.families() | {name: (config, plain) for name, config in _more().items()}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Checkpoint, Path]]:
    """Every family's checkpoint and float32 graph, all from one start of the builder."""
    folder = tmp_path_factory.mktemp("families")
    made = {}
    for name, (config, tokens) in _families().items():
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        path = tiny_checkpoints.save(folder / name, config, dtype=dtype, tokens=tokens)
        made[name] = (Checkpoint.open(path), folder / f"{name}-onnx")
    onnx.build(list(made.values()), "fp32")
    return made


@pytest.mark.parametrize("family", list(_families()))
def test_every_family_computes_what_transformers_computes(
    graphs: dict[str, tuple[Checkpoint, Path]], family: str
) -> None:
    checkpoint, folder = graphs[family]
    wanted = reference(checkpoint, TOKENS)
    assert kl(wanted, log_probabilities(folder, TOKENS)[:-1]) < 1e-9
    assert kl(wanted, log_probabilities(folder, TOKENS, steps=6)[:-1]) < 1e-9
    last = genai_logits(folder, TOKENS[:-1])
    assert kl(wanted[-1:], (last - np.logaddexp.reduce(last))[None]) < 1e-9
    few = TOKENS[:20]  # a short text, for which longrope has other factors
    assert kl(reference(checkpoint, few), log_probabilities(folder, few)[:-1]) < 1e-9


def test_pruned_models_export(tiny: Checkpoint, random_rows: Any, tmp_path: Path) -> None:
    def context(name: str) -> Context:
        return Context(tmp_path / name, tmp_path / f"{name}-work", tiny, random_rows)

    thin = PruneWidth(axes=("channels", "groups"), sizes={"channels": 96, "groups": 1}).run(
        tiny, context("thin")
    )
    short = PruneDepth(layers=3).run(thin, context("short"))
    onnx.export(short, tmp_path / "onnx", FP32)
    assert kl(reference(short, TOKENS), log_probabilities(tmp_path / "onnx", TOKENS)[:-1]) < 1e-9


def test_float16_is_for_any_device(tiny: Checkpoint, tmp_path: Path) -> None:
    onnx.export(tiny, tmp_path / "onnx", Precision("fp16"))
    assert '"provider_options": []' in (tmp_path / "onnx/genai_config.json").read_text()
    assert kl(reference(tiny, TOKENS), log_probabilities(tmp_path / "onnx", TOKENS)[:-1]) < 1e-4


def test_a_rope_that_the_builder_lacks_is_refused_by_name(tmp_path: Path) -> None:
    rope = {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 32}
    config = tiny_checkpoints.family_config("llama", **tiny_checkpoints._rope("longrope", **rope))
    saved = tiny_checkpoints.save(tmp_path / "llama", config)
    with pytest.raises(Unsupported, match="longrope"):
        onnx.export(Checkpoint.open(saved), tmp_path / "onnx", FP32)
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_what_cannot_be_exported_is_refused_before_the_work(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="int5"):
        Precision("int5")
    with pytest.raises(BadInput, match="48"):
        Precision("int4", block=48)
    tensors = {name: tensor.clone() for name, tensor in tiny.tensors()}
    tensors["model.norm.weight"][0] = float("nan")
    broken = tiny.with_tensors(tensors.items(), tmp_path / "broken")
    with pytest.raises(InvalidModelFile, match=r"model\.norm\.weight"):
        onnx.export(broken, tmp_path / "onnx", FP32)
    tensors["model.norm.weight"][0] = 1e6
    wide = tiny.with_tensors(tensors.items(), tmp_path / "wide")
    with pytest.raises(BadInput, match="65504"):
        onnx.export(wide, tmp_path / "onnx", Precision("fp16"))
    (wide.folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="tokenizer"):
        onnx.export(wide, tmp_path / "onnx", FP32)


@pytest.fixture(scope="module")
def smollm2_fp32(smollm2: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2-onnx") / "fp32"
    onnx.export(smollm2, folder, FP32)
    return folder


def test_smollm2_says_what_transformers_says(smollm2: Checkpoint, smollm2_fp32: Path) -> None:
    text = "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = smollm2.tokenizer()
    prompt = torch.tensor([tokenizer(text).input_ids])
    with torch.inference_mode():
        said = smollm2.load().generate(prompt, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    wanted = tokenizer.decode(said[0, prompt.shape[1] :], skip_special_tokens=True)
    assert genai_greedy(smollm2_fp32, text, 24) == wanted


def test_four_bits_are_as_small_as_llama_cpps(smollm2_fp32: Path, tmp_path: Path) -> None:
    """Q4_0 of this model is a file of 91.7 MB."""
    assert onnx.quantize(smollm2_fp32, tmp_path, Precision("int4")) == []
    size = sum(f.stat().st_size for f in tmp_path.glob("model.onnx*"))
    assert size < 1.1 * 91.7e6
