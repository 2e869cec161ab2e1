"""Checkpoints on disk: what is checked, and what a damaged one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoints
import torch
from safetensors.torch import load_file, save_file

from alight.errors import BadInput, InvalidModelFile, Unsupported
from alight_converters import checkpoint as module
from alight_converters.checkpoint import Checkpoint, write


def reopened(checkpoint: Checkpoint, **config: object) -> Checkpoint:
    (checkpoint.folder / "config.json").write_text(json.dumps(checkpoint.config | config))
    return Checkpoint.open(checkpoint.folder)


@pytest.fixture
def sharded(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(module, "SHARD", 200_000)
    return tiny.with_tensors(tiny.tensors(), tmp_path / "sharded")


def test_shards_hold_the_same(tiny: Checkpoint, sharded: Checkpoint) -> None:
    assert len(set(sharded.shards.values())) > 3
    assert all(torch.equal(sharded.tensor(name), tensor) for name, tensor in tiny.tensors())
    assert sharded.shapes == tiny.shapes and sharded.parameters == tiny.parameters
    sharded.check_shapes()
    sharded.check()
    tokens = torch.arange(2, 40)[None]
    assert torch.equal(sharded.load()(tokens).logits, tiny.load()(tokens).logits)


def test_a_missing_shard(sharded: Checkpoint) -> None:
    (sharded.folder / next(iter(sharded.shards.values())).name).unlink()
    with pytest.raises(InvalidModelFile, match=r"lacks 1 of \d+ weight files, first model-0"):
        Checkpoint.open(sharded.folder)


@pytest.mark.parametrize("content", ["not json", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_damaged_index(sharded: Checkpoint, content: str) -> None:
    (sharded.folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InvalidModelFile, match="index"):
        Checkpoint.open(sharded.folder)


def test_an_index_that_points_outside(sharded: Checkpoint) -> None:
    (sharded.folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../secret"}}')
    with pytest.raises(InvalidModelFile, match="outside"):
        Checkpoint.open(sharded.folder)


def test_a_truncated_file(tiny: Checkpoint) -> None:
    file = tiny.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InvalidModelFile, match="damaged"):
        Checkpoint.open(tiny.folder)


def test_pickles_are_not_loaded(tiny: Checkpoint) -> None:
    (tiny.folder / "model.safetensors").rename(tiny.folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"no \*\.safetensors") as error:
        Checkpoint.open(tiny.folder)
    assert "safetensors" in error.value.hint


def test_a_config_that_contradicts_the_tensors(tiny: Checkpoint) -> None:
    with pytest.raises(InvalidModelFile, match=r"mlp.* is \[\d+, \d+\], not \[") as error:
        reopened(tiny, intermediate_size=128).check_shapes()
    assert "and 9 more" in error.value.message
    with pytest.raises(InvalidModelFile, match=r"layers\.4\..* is missing"):
        reopened(tiny, num_hidden_layers=5).check_shapes()
    with pytest.raises(InvalidModelFile, match=r"layers\.3\..* is not part of the model"):
        reopened(tiny, num_hidden_layers=3).check_shapes()


def test_a_config_that_transformers_refuses(tiny: Checkpoint) -> None:
    with pytest.raises(InvalidModelFile, match="not usable"):
        _ = reopened(tiny, num_hidden_layers="four").full_config


@pytest.mark.parametrize("content", ["not json", "[]"])
def test_a_config_that_is_none(tiny: Checkpoint, content: str) -> None:
    (tiny.folder / "config.json").write_text(content)
    with pytest.raises(InvalidModelFile, match=r"not JSON|not an object"):
        Checkpoint.open(tiny.folder)


def test_quantized_weights(tiny: Checkpoint) -> None:
    with pytest.raises(Unsupported, match="quantized already"):
        reopened(tiny, quantization_config={"quant_method": "awq"}).check_shapes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny: Checkpoint, value: float) -> None:
    file = tiny.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    save_file(tensors, file)
    with pytest.raises(InvalidModelFile, match=r"layers\.1\.mlp\.down_proj\.weight.* 1 NaN or infinite"):
        Checkpoint.open(tiny.folder).check()


def test_a_single_file_beside_others(tiny: Checkpoint) -> None:
    """Mistral's folders hold the same weights a second time, under names of its own."""
    save_file({"tok_embeddings.weight": torch.zeros(2)}, tiny.folder / "consolidated.safetensors")
    Checkpoint.open(tiny.folder).check_shapes()


def test_nothing_half_written_stays(tiny: Checkpoint, tmp_path: Path) -> None:
    def tensors():  # type: ignore[no-untyped-def]
        yield "a", torch.zeros(3)
        raise InvalidModelFile("the source ended")

    with pytest.raises(InvalidModelFile, match="the source ended"):
        write(tmp_path / "new", tiny.config, tensors())
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_the_digest_says_what_is_inside(tiny: Checkpoint, tmp_path: Path) -> None:
    same = tiny.with_tensors(tiny.tensors(), tmp_path / "same")
    other = tiny.with_tensors(((n, t * 2) for n, t in tiny.tensors()), tmp_path / "other")
    assert (
        Checkpoint.open(tiny_checkpoints.save(tmp_path / "again", tiny_checkpoints.llama_config())).digest
        == tiny.digest
    )
    assert same.shapes == tiny.shapes and len({tiny.digest, other.digest}) == 2
