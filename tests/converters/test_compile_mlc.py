"""Compiled MLC libraries compute what transformers computes with the same weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import mlc_models
import numpy as np
import pytest
import tiny_checkpoints
import torch

from alight.errors import BadInput, InvalidModelFile, Unsupported
from alight_converters.checkpoint import Checkpoint
from alight_converters.compile_mlc import compile_library
from alight_converters.export.mlc import export
from alight_converters.export.mlc_modes import MODES

FAMILIES = ("llama3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi4-mini")
CONTEXT = 64


def checkpoint(family: str, folder: Path) -> Checkpoint:
    config, tokens = tiny_checkpoints.families()[family]
    if not family.startswith("gemma"):  # whose layers differ
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
    return Checkpoint.open(tiny_checkpoints.save(folder / family, config, tokens=tokens))


def logits_of(folder: Path, tokens: list[int], read: int) -> np.ndarray:
    """The logits after each token: `read` of them as a prompt, the others one by one."""
    engine = mlc_models.backend(folder)
    engine.add(0)
    rows = [engine.extend(0, tokens[:read])] + [engine.decode([0], [token])[0] for token in tokens[read:]]
    engine.close()
    return np.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    source = checkpoint(family, tmp_path)
    folder = mlc_models.build(source, tmp_path / "mlc", "q4f32_1", CONTEXT)
    tokens = [int(t) for t in np.random.default_rng(0).integers(2, 300, 40)]
    with torch.no_grad():
        expected = mlc_models.reference(source, "q4f32_1")(torch.tensor([tokens])).logits[0, 23:].numpy()
    np.testing.assert_allclose(logits_of(folder, tokens, read=24), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_computes_what_transformers_does(mode: str, tmp_path: Path) -> None:
    source = checkpoint("smollm2", tmp_path)
    folder = mlc_models.build(source, tmp_path / "mlc", mode, CONTEXT)
    tokens = [int(t) for t in np.random.default_rng(1).integers(2, 300, 30)]
    with torch.no_grad():
        expected = mlc_models.reference(source, mode)(torch.tensor([tokens])).logits[0, 19:].numpy()
    tolerance = 2e-2 if "f16" in mode else 2e-3  # keys and values are held in the mode's type
    np.testing.assert_allclose(logits_of(folder, tokens, read=20), expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `mlc-chat-config.json` of a tiny Llama."""
    folder = tmp_path_factory.mktemp("config")
    export(checkpoint("smollm2", folder), folder / "mlc", "q4f32_1", context=CONTEXT)
    found: dict[str, Any] = json.loads((folder / "mlc" / "mlc-chat-config.json").read_text())
    return found


def test_what_cannot_be_compiled_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    def compiled(mode: str = "q4f32_1", target: str = "native", context: int = 64, **changed: object) -> None:
        sizes = config["model_config"] | changed
        compile_library(config | {"model_config": sizes}, mode, target, tmp_path, context=context)

    with pytest.raises(BadInput, match="q3f16_1"):
        compiled(mode="q3f16_1")
    with pytest.raises(BadInput, match="z80"):
        compiled(target="z80")
    with pytest.raises(BadInput, match="context is 4"):
        compiled(context=4)
    with pytest.raises(Unsupported, match="intermediate_size is 100"):
        compiled(intermediate_size=100)
    with pytest.raises(Unsupported, match="head_dim is 20"):
        compiled(mode="q0f32", head_dim=20)
    with pytest.raises(Unsupported, match="'yarn'"):
        compiled(rope_scaling={"rope_type": "yarn"})
    with pytest.raises(InvalidModelFile, match="rope_theta"):
        compiled(rope_theta=None, position_embedding_base=None)
    with pytest.raises(Unsupported, match="'gpt2'"):
        compile_library(config | {"model_type": "gpt2"}, "q4f32_1", "native", tmp_path, context=64)
    assert not (tmp_path / "lib").exists()


def test_libraries_of_several_machines_lie_side_by_side(config: dict[str, Any], tmp_path: Path) -> None:
    one = config | {"model_config": config["model_config"] | {"num_hidden_layers": 1}}
    for target in ("x86-64-v3", "macos-arm64"):
        compile_library(one, "q4f32_1", target, tmp_path, context=64)
    listed = json.loads((tmp_path / "lib" / "libraries.json").read_text())
    assert sorted(path.name for path in (tmp_path / "lib").iterdir()) == [
        "libraries.json", "macos-arm64.tar", "x86-64-v3.so",
    ]  # fmt: skip
    assert {entry["file"] for entry in listed.values()} == {"macos-arm64.tar", "x86-64-v3.so"}
    assert listed["macos-arm64"]["run"].startswith("unrun") and not listed["x86-64-v3"]["run"]
    assert {"batch_prefill", "batch_decode", "_metadata"} <= set(listed["x86-64-v3"]["functions"])


def test_the_functions_that_engines_sample_with(config: dict[str, Any], tmp_path: Path) -> None:
    import tvm
    from tvm import relax

    one = config | {"model_config": config["model_config"] | {"num_hidden_layers": 1}}
    library = tvm.runtime.load_module(str(compile_library(one, "q4f32_1", "native", tmp_path, context=64)))
    machine = relax.VirtualMachine(library, tvm.cpu())
    in_place = partial(machine.module.get_function, query_imports=True)  # as mlc_llm finds them
    rows = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)

    def put(values: object, kind: str) -> Any:
        return tvm.runtime.tensor(np.array(values, kind))

    cold = machine["softmax_with_temperature"](
        put(rows[:, None], "float32"), put([0.0, 2.0], "float32")
    ).numpy()
    assert cold[0, 0].argmax() == rows[0].argmax() and cold[0, 0].max() == 1
    np.testing.assert_allclose(cold[1, 0], np.exp(rows[1] / 2) / np.exp(rows[1] / 2).sum(), rtol=1e-5)

    logits, expected = put(rows, "float32"), rows.copy()
    in_place("apply_logit_bias_inplace")(logits, put([1], "int32"), put([3], "int32"), put([2.5], "float32"))
    expected[1, 3] += 2.5
    penalties = put([[0.5, 0.25, 2.0]], "float32")
    numbers = [put([1], "int32"), put([0, 0], "int32"), put([3, 4], "int32"), put([1, 2], "int32")]
    in_place("apply_penalty_inplace")(logits, *numbers, penalties)
    for token, count in ((3, 1), (4, 2)):
        value = expected[1, token] - 0.5 - 0.25 * count
        expected[1, token] = value * 2 if value < 0 else value / 2
    in_place("apply_bitmask_inplace")(logits, put([0], "int32"), put([[0b1010, 0], [-1, -1]], "int32"))
    expected[0, [t for t in range(40) if t not in (1, 3)]] = np.finfo(np.float32).min
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-6)
