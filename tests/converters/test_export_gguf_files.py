"""What an export leaves on disk, how much memory it takes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import tiny_tokenizers
import torch

from alight import plugins
from alight.artifact import WEIGHT, Artifact, Layer
from alight.errors import BadInput, DiskFull, InvalidModelFile, Unsupported
from alight.gguf import read_header
from alight.target import LoadOptions
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.gguf import export

TOKENS = list(range(3, 60, 2))


def scores(artifact: Artifact) -> np.ndarray:
    with plugins.choose_target(artifact).load(artifact, LoadOptions(context=64)) as model:
        found = model.score(TOKENS, distribution=True).distribution
    assert found is not None
    return found


def of_parts(files: list[Path]) -> Artifact:
    first = Artifact.loose(files[0])
    layers = tuple(Layer(f.name, WEIGHT, "", f.stat().st_size) for f in files)
    return replace(first, layers=layers, files={f.name: f for f in files})


def test_parts_hold_the_same_model(tiny: Checkpoint, tmp_path: Path) -> None:
    (whole,) = export(tiny, tmp_path / "whole.gguf", "F32")
    parts = export(tiny, tmp_path / "parts.gguf", "F32", shard=300_000)
    assert len(parts) > 2
    assert [p.name for p in parts] == [
        f"parts-{n:05}-of-{len(parts):05}.gguf" for n in range(1, 1 + len(parts))
    ]
    assert all(sum(t.nbytes for t in read_header(p).tensors) <= 300_000 for p in parts)
    assert np.array_equal(scores(of_parts(parts)), scores(Artifact.loose(whole)))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*(p.name for p in parts), "tiny", "whole.gguf"]
    )


@pytest.mark.parametrize(("dtype", "largest"), [("F16", 2e-5), ("BF16", 2e-3)])
def test_half_precision(tiny: Checkpoint, tmp_path: Path, dtype: str, largest: float) -> None:
    (whole,) = export(tiny, tmp_path / "whole.gguf", "F32")
    (half,) = export(tiny, tmp_path / "half.gguf", dtype)
    assert read_header(half).quantization == dtype
    assert {t.type for t in read_header(half).tensors if len(t.shape) > 1} == {dtype}
    wanted, got = scores(Artifact.loose(whole)), scores(Artifact.loose(half))
    assert 0 < (np.exp(wanted) * (wanted - got)).sum(-1).mean() < largest


def test_a_failed_export_leaves_what_was_there(tiny: Checkpoint, tmp_path: Path) -> None:
    (file,) = export(tiny, tmp_path / "model.gguf", "F32")
    before = file.read_bytes()
    damaged = changed(tiny, tmp_path / "damaged", "model.layers.3.mlp.up_proj.weight", lambda t: t / 0)
    with pytest.raises(InvalidModelFile, match=r"layers\.3\.mlp\.up_proj\.weight.* NaN"):
        export(damaged, file, "F32")
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "model.gguf", "tiny"]


def changed(tiny: Checkpoint, folder: Path, name: str, change: Any) -> Checkpoint:
    return tiny.with_tensors(((n, change(t) if n == name else t) for n, t in tiny.tensors()), folder)


def test_values_that_overflow(tiny: Checkpoint, tmp_path: Path) -> None:
    large = changed(tiny, tmp_path / "large", "lm_head.weight", lambda t: t * 1e6)
    with pytest.raises(BadInput, match="65504") as error:
        export(large, tmp_path / "model.gguf", "F16")
    assert "BF16" in error.value.hint
    export(large, tmp_path / "model.gguf", "BF16")


def test_a_full_disk(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(DiskFull, match="needed"):
        export(tiny, tmp_path / "model.gguf")


def test_an_unknown_type(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Q4_0") as error:
        export(tiny, tmp_path / "model.gguf", "Q4_0")
    assert "F16" in error.value.hint


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                   "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
         "no rope scaling 'llama3'"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_run(tmp_path: Path, kind: str, settings: dict[str, Any], reason: str) -> None:
    config = tiny_checkpoints.family_config(kind, **settings)
    checkpoint = Checkpoint.open(
        tiny_checkpoints.save(tmp_path / "tiny", config, tokens=tiny_tokenizers.byte_level("gpt-2"))
    )
    with pytest.raises(Unsupported, match=reason):
        export(checkpoint, tmp_path / "model.gguf")


def with_tokenizer(tiny: Checkpoint, folder: Path, **changes: Any) -> Checkpoint:
    """The tiny checkpoint with a tokenizer that differs at its top level, or in its model."""
    checkpoint = tiny.with_tensors(tiny.tensors(), folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    model = tokenizer["model"] | changes.pop("model", {})
    file.write_text(json.dumps(tokenizer | {"model": model} | changes))
    return checkpoint


SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": SPLIT}, r"splits text by '\\\\w\+'"),
        ({"pre_tokenizer": {"type": "Punctuation", "behavior": "Contiguous"}}, "Punctuation"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"model": {"type": "WordPiece"}}, "WordPiece"),
        ({"model": {"byte_fallback": True, "merges": [["a", "b"]], "vocab": {"a": 0, "b": 1, "ab": 2, "bb": 3},
                    "type": "BPE"}, "pre_tokenizer": None, "normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"model": {"byte_fallback": True, "merges": [["a", "bc"], ["b", "c"]],
                    "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}}, "pre_tokenizer": None},
         "not SentencePiece's"),
    ],
)  # fmt: skip
def test_tokenizers_that_llama_cpp_has_not(
    tiny: Checkpoint, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason) as error:
        export(with_tokenizer(tiny, tmp_path / "other", **changes), tmp_path / "model.gguf")
    assert error.value.hint


def test_no_tokenizer(tiny: Checkpoint, tmp_path: Path) -> None:
    (tiny.folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"no tokenizer"):
        export(tiny, tmp_path / "model.gguf")


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    config = tiny_checkpoints.llama_config(vocab_size=300)
    checkpoint = Checkpoint.open(tiny_checkpoints.save(tmp_path / "tiny", config))
    with pytest.raises(InvalidModelFile, match="the vocabulary has 300"):
        export(checkpoint, tmp_path / "model.gguf")


MEASURE = """
import sys, threading, time
from pathlib import Path
import psutil
from transformers import AutoModelForCausalLM, AutoTokenizer
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.gguf import export
tiny, large, target = map(Path, sys.argv[1:])
export(Checkpoint.open(tiny), target)  # everything is imported now
process, peak = psutil.Process(), 0
def watch():
    global peak
    while True:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)
before = process.memory_info().rss
threading.Thread(target=watch, daemon=True).start()
export(Checkpoint.open(large), target)
print(peak - before)
"""


def test_memory_stays_far_below_the_model(tiny: Checkpoint, tmp_path: Path) -> None:
    config = tiny_checkpoints.llama_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    large = Checkpoint.open(tiny_checkpoints.save(tmp_path / "large", config, dtype=torch.float32))
    assert large.bytes > 400e6
    command = [sys.executable, "-c", MEASURE, str(tiny.folder), str(large.folder), str(tmp_path / "x.gguf")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 < peak < large.bytes / 4
