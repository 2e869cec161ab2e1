"""Checkpoints exported as MLC: every tensor under mlc_llm's name, with the values that its own converter gives."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import mlc_folder
import numpy as np
import pytest
import tiny_checkpoints
import torch

from alight_converters.checkpoint import Checkpoint
from alight_converters.export.mlc import export
from alight_converters.export.mlc_modes import quantize, to_bfloat16
from alight_converters.qat.grids import GRIDS

GOLDEN = Path(__file__).parent.parent / "data" / "mlc" / "smollm2-q4f16_1.json"
FAMILIES = {
    name: family
    for name, family in tiny_checkpoints.families().items()
    if name not in ("llama-bias", "qwen2-yarn", "granite")
}

# MLC's tensors -> the checkpoint's, whose rows stand one below the other. N is a layer.
QKV = [f"model.layers.N.self_attn.{x}_proj.weight" for x in "qkv"]
GATE_UP = [f"model.layers.N.mlp.{x}_proj.weight" for x in ("gate", "up")]
ALIKE = [
    f"model.{x}.weight"
    for x in (
        "embed_tokens", "norm", "layers.N.input_layernorm", "layers.N.post_attention_layernorm",
        "layers.N.self_attn.o_proj", "layers.N.mlp.down_proj",
    )
]  # fmt: skip
LLAMA = {name: [name] for name in ALIKE} | {
    "model.layers.N.self_attn.qkv_proj.weight": QKV,
    "model.layers.N.mlp.gate_up_proj.weight": GATE_UP,
}
QWEN2 = {name: [name] for name in ALIKE} | {
    "model.layers.N.self_attn.c_attn.weight": QKV,
    "model.layers.N.mlp.gate_up_proj.weight": GATE_UP,
}
HEAD = {"lm_head.weight": ["lm_head.weight"]}
HEAD_NORMS = [f"model.layers.N.self_attn.{x}_norm.weight" for x in "qk"]
GEMMA_NORMS = [f"model.layers.N.{x}_feedforward_layernorm.weight" for x in ("pre", "post")]
PHI3 = {
    "transformer.embd.weight": ["model.embed_tokens.weight"],
    "transformer.norm.weight": ["model.norm.weight"],
    "transformer.h.N.ln.weight": ["model.layers.N.input_layernorm.weight"],
    "transformer.h.N.post_attention_layernorm.weight": ["model.layers.N.post_attention_layernorm.weight"],
    "transformer.h.N.mixer.qkv_proj.weight": ["model.layers.N.self_attn.qkv_proj.weight"],
    "transformer.h.N.mixer.out_proj.weight": ["model.layers.N.self_attn.o_proj.weight"],
    "transformer.h.N.mlp.gate_up_proj.weight": ["model.layers.N.mlp.gate_up_proj.weight"],
    "transformer.h.N.mlp.down_proj.weight": ["model.layers.N.mlp.down_proj.weight"],
} | HEAD
NAMES = {
    "llama2": LLAMA | HEAD,
    "llama3": LLAMA | HEAD,
    "smollm2": LLAMA,
    "mistral": LLAMA | HEAD,
    "mistral-nemo": LLAMA | HEAD,
    "qwen2": QWEN2 | {"model.layers.N.self_attn.c_attn.bias": [q.replace("weight", "bias") for q in QKV]},
    "qwen3": QWEN2 | HEAD | {n: [n] for n in HEAD_NORMS},
    "gemma2": LLAMA | {n: [n] for n in GEMMA_NORMS},
    "gemma3": {
        f"language_model.{n}": [n] for n in (*ALIKE, *QKV, *HEAD_NORMS, *GEMMA_NORMS)
    } | {"language_model.model.layers.N.mlp.gate_up_proj.weight": GATE_UP},
    "phi3": PHI3,
    "phi4": PHI3,
    "phi4-mini": PHI3,
}  # fmt: skip


def expected(checkpoint: Checkpoint, names: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """MLC's tensors of a checkpoint, in float32."""
    layers = range(checkpoint.config["num_hidden_layers"])
    gemma = checkpoint.config["model_type"].startswith("gemma")
    found = {}
    for theirs, ours in names.items():
        for layer in map(str, layers) if ".N." in theirs else [""]:
            rows = [checkpoint.tensor(name.replace("N", layer)).float() for name in ours]
            whole = torch.cat(rows) + (1 if gemma and rows[0].dim() == 1 else 0)
            found[theirs.replace("N", layer)] = whole.numpy()
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, dict[str, np.ndarray], Path]:
    """A tiny checkpoint of each family, what MLC is to have of it, and an empty folder."""
    config, tokens = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = Checkpoint.open(tiny_checkpoints.save(folder / "tiny", config, tokens=tokens))
    return checkpoint, expected(checkpoint, NAMES[request.param]), folder


Family = tuple[Checkpoint, dict[str, np.ndarray], Path]


def test_float_modes_are_exact(family: Family) -> None:
    checkpoint, wanted, folder = family
    half = mlc_folder.tensors(export(checkpoint, folder / "q0f16", "q0f16"))
    full = mlc_folder.tensors(export(checkpoint, folder / "q0f32", "q0f32"))
    assert half.keys() == full.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(half[name], values.astype(np.float16)), name
        assert np.array_equal(full[name], torch.from_numpy(values).bfloat16().float().numpy()), name


@pytest.mark.parametrize("mode", ["q4f16_1", "q4f32_1"])
def test_matrices_in_four_bits(family: Family, mode: str) -> None:
    checkpoint, wanted, folder = family
    got = mlc_folder.weights(export(checkpoint, folder / mode, mode))
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        if values.ndim == 1:
            precise = 2**-10 if mode == "q4f16_1" else 2**-8  # float16; bfloat16 on disk
            assert np.allclose(got[name], values, rtol=precise, atol=0), name
            continue
        step = np.abs(values.reshape(len(values), -1, 32)).max(-1, keepdims=True) / 7
        errors = np.abs(got[name].astype(np.float32) - values).reshape(step.shape[0], -1, 32)
        assert (errors <= 0.53 * step + 1e-6).all(), name  # half a step, and what the scale is rounded by
        assert (errors > 0.3 * step).mean() > 0.1, name  # it was rounded at all


def test_smollm2_is_what_mlc_llm_writes(smollm2: Checkpoint, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    folder = export(smollm2, tmp_path / "mlc", "q4f16_1")
    stored = mlc_folder.stored(folder)
    got = {
        name: [record["shape"], record["dtype"], hashlib.md5(data).hexdigest()]
        for name, (record, data) in stored.items()
    }
    assert got == golden["tensors"]
    cache = json.loads((folder / "tensor-cache.json").read_text())
    assert cache["metadata"] == golden["metadata"]
    assert [[s["dataPath"], s["nbytes"], s["md5sum"]] for s in cache["records"]] == golden["shards"]
    for shard in cache["records"]:
        assert hashlib.md5((folder / shard["dataPath"]).read_bytes()).hexdigest() == shard["md5sum"]
    assert (folder / "ndarray-cache.json").read_bytes() == (folder / "tensor-cache.json").read_bytes()


def test_weights_on_the_grid_stay_as_they_are(tiny: Checkpoint, tmp_path: Path) -> None:
    """What quantization-aware training leaves behind is exported without any loss."""
    on_grid = tiny.with_tensors(
        ((n, GRIDS["q4f16_1"].linear(t) if t.dim() == 2 else t) for n, t in tiny.tensors()),
        tmp_path / "on-grid",
    )
    got = mlc_folder.weights(export(on_grid, tmp_path / "mlc", "q4f16_1"))
    for name, values in expected(on_grid, NAMES["llama2"]).items():
        if values.ndim == 2:
            assert np.array_equal(got[name], values), name


def test_rows_that_do_not_divide_into_groups() -> None:
    weight = np.random.default_rng(0).normal(size=(3, 70)).astype(np.float32)
    words, scales = quantize(weight)
    assert words.shape == (3, 12)
    assert scales.shape == (3, 3)
    assert np.array_equal(scales[:, 2], np.abs(weight[:, 64:]).max(-1) / np.float32(7))
    assert (words[:, 9:] == 0).all()  # nothing is left of what fills the last group
    assert (words[:, 8] >> 24 == 0).all()


def test_a_group_of_zeros_and_one_too_small_for_a_scale() -> None:
    weight = np.zeros((2, 32), np.float16)
    weight[1] = np.finfo(np.float16).smallest_subnormal
    words, scales = quantize(weight)
    assert (scales == 0).all()
    assert (words == 0x77777777).all()


def test_bfloat16_is_torchs() -> None:
    values = np.random.default_rng(0).normal(size=10000).astype(np.float32)
    values[:3] = 1.00390625, 1.01171875, -1.00390625  # between two neighbours
    wanted = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(values), wanted)


MEASURE = """
import sys, threading, time
from pathlib import Path
import psutil
from transformers import AutoModelForCausalLM, AutoTokenizer
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.mlc import export
tiny, large, target = map(Path, sys.argv[1:])
export(Checkpoint.open(tiny), target / "tiny")  # everything is imported now
process, peak = psutil.Process(), 0
def watch():
    global peak
    while True:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)
before = process.memory_info().rss
threading.Thread(target=watch, daemon=True).start()
export(Checkpoint.open(large), target / "large")
print(peak - before)
"""


def test_memory_stays_far_below_the_model(tiny: Checkpoint, tmp_path: Path) -> None:
    config = tiny_checkpoints.llama_config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=8)
    large = Checkpoint.open(tiny_checkpoints.save(tmp_path / "large", config))
    assert large.bytes > 350e6
    command = [sys.executable, "-c", MEASURE, str(tiny.folder), str(large.folder), str(tmp_path / "mlc")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 < peak < large.bytes / 3
