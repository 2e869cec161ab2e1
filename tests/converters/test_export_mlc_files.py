"""What an MLC export leaves on disk besides weights, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import mlc_folder
import pytest
import tiny_checkpoints
import tiny_tokenizers
from pydantic import ValidationError

from alight.artifact import Artifact
from alight.errors import AlightError, BadInput, DiskFull, InvalidModelFile, MissingExtra, Unsupported
from alight_converters.build_weights import Weights
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.mlc import export
from alight_converters.mlc_export import MLC
from alight_converters.recipe_export import ExportContext

FILES = {
    "mlc-chat-config.json", "tensor-cache.json", "ndarray-cache.json", "params_shard_0.bin", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "mlc-chat-config.json").read_text())
    return found


def checkpoint_of(folder: Path, name: str) -> Checkpoint:
    config, tokens = tiny_checkpoints.families()[name]
    return Checkpoint.open(tiny_checkpoints.save(folder / name, config, tokens=tokens))


def variant(folder: Path, kind: str, **settings: Any) -> Checkpoint:
    config = tiny_checkpoints.family_config(kind, **settings)
    tokens = tiny_tokenizers.byte_level("gpt-2")
    return Checkpoint.open(tiny_checkpoints.save(folder / "tiny", config, tokens=tokens))


def test_the_folder(tiny: Checkpoint, tmp_path: Path) -> None:
    folder = export(tiny, tmp_path / "mlc")
    assert {f.name for f in folder.iterdir()} == FILES
    assert sorted(f.name for f in tmp_path.iterdir()) == ["mlc", "tiny"]
    about = Artifact.loose(folder).description
    assert (about.format, about.architecture, about.quantization) == ("mlc", "llama", "q4f16_1")
    assert about.parameters == tiny.parameters


def test_the_config_of_smollm2(smollm2: Checkpoint, tmp_path: Path) -> None:
    """The same as mlc_llm's `gen_config` writes, but for sizes and words that are a choice."""
    config = config_of(export(smollm2, tmp_path / "mlc", "q4f32_1", context=2048))
    assert config["model_type"] == "llama"
    assert config["quantization"] == "q4f32_1"
    sizes = config["model_config"]
    assert sizes | {"rms_norm_eps": 1e-5} == {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "position_embedding_base": 100000.0,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "context_window_size": 2048,
        "prefill_chunk_size": 1024,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tensor_parallel_shards": 1,
        "max_batch_size": 128,
    }
    assert sizes["rms_norm_eps"] == pytest.approx(1e-5)
    assert config["context_window_size"] == 2048
    assert config["active_vocab_size"] == 49152
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (2, 1, 2)
    assert config["tokenizer_files"] == ["tokenizer.json", "tokenizer_config.json"]
    assert config["tokenizer_info"] == {
        "token_postproc_method": "byte_level",
        "prepend_space_in_encode": False,
        "strip_space_in_decode": False,
    }
    conversation = config["conv_template"]
    assert conversation["system_template"] == "<|im_start|>system\n{system_message}<|im_end|>\n"
    assert conversation["roles"] == {"user": "<|im_start|>user", "assistant": "<|im_start|>assistant"}
    assert conversation["seps"] == ["<|im_end|>\n"]
    assert conversation["stop_token_ids"] == [2]
    assert (tmp_path / "mlc" / "chat_template.jinja").read_text() == (
        smollm2.folder / "chat_template.jinja"
    ).read_text()


@pytest.mark.parametrize(
    ("name", "model_type", "fields"),
    [
        ("llama3", "llama", {"position_embedding_base": 10000.0, "head_dim": 32}),
        ("mistral", "llama", {"tie_word_embeddings": False, "position_embedding_base": 50000.0}),
        ("qwen2", "qwen2", {"rope_theta": 50000.0, "hidden_act": "silu", "tie_word_embeddings": True}),
        ("qwen3", "qwen3", {"rope_theta": 50000.0, "attention_bias": False, "head_dim": 32}),
        ("gemma2", "gemma2", {"attn_logit_softcapping": 30.0, "final_logit_softcapping": 20.0, "sliding_window": 16}),
        ("gemma3", "gemma3_text", {"position_embedding_base": 1000000.0, "rope_local_base_freq": 10000.0,
                                   "final_logit_softcapping": 20.0, "sliding_window": 16}),
        ("phi4-mini", "phi3", {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096}),
    ],
)  # fmt: skip
def test_what_a_family_needs(tmp_path: Path, name: str, model_type: str, fields: dict[str, Any]) -> None:
    config = config_of(export(checkpoint_of(tmp_path, name), tmp_path / "mlc"))
    assert config["model_type"] == model_type
    assert {key: config["model_config"][key] for key in fields} == fields


def test_rope_scaling(tmp_path: Path) -> None:
    llama = config_of(export(checkpoint_of(tmp_path, "llama3"), tmp_path / "a"))["model_config"][
        "rope_scaling"
    ]
    assert llama["rope_type"] == "llama3"
    assert (llama["factor"], llama["low_freq_factor"], llama["high_freq_factor"]) == (8.0, 1.0, 4.0)
    phi = config_of(export(checkpoint_of(tmp_path, "phi4-mini"), tmp_path / "b"))["model_config"][
        "rope_scaling"
    ]
    assert phi["type"] == "longrope"
    assert len(phi["long_factor"]) == len(phi["short_factor"]) == 6


def test_sentencepiece(tmp_path: Path) -> None:
    config = config_of(export(checkpoint_of(tmp_path, "llama2"), tmp_path / "mlc"))
    assert config["tokenizer_info"] == {
        "token_postproc_method": "byte_fallback",
        "prepend_space_in_encode": True,
        "strip_space_in_decode": True,
    }


def test_a_tokenizer_of_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint.folder / name).unlink()
    (checkpoint.folder / "tokenizer.model").write_bytes(tiny_tokenizers.sentencepiece_model())
    folder = export(checkpoint, tmp_path / "mlc")
    assert config_of(folder)["tokenizer_files"] == [
        "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["byte_fallback"]


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("granite", {}, "cannot export Granite for MLC"),
        ("llama", {"attention_bias": True}, r"no place for tensor 'model\.layers\.0\.self_attn\.k_proj\.bias'"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("gemma2", {"tie_word_embeddings": False, "head_dim": 32}, "no place for tensor 'lm_head.weight'"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn' for Qwen2"),
    ],
)  # fmt: skip
def test_what_mlc_cannot_run(tmp_path: Path, kind: str, settings: dict[str, Any], reason: str) -> None:
    checkpoint = variant(tmp_path, kind, **settings)
    with pytest.raises(Unsupported, match=reason) as error:
        export(checkpoint, tmp_path / "mlc")
    assert error.value.hint
    assert [f.name for f in tmp_path.iterdir()] == ["tiny"]


def test_bad_settings(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="q5f16") as error:
        export(tiny, tmp_path / "mlc", "q5f16")
    assert "q4f16_1" in error.value.hint
    with pytest.raises(BadInput, match="300 tokens is wanted; the model was trained for 256"):
        export(tiny, tmp_path / "mlc", context=300)
    with pytest.raises(BadInput, match="exists already"):
        export(tiny, tiny.folder)


def test_a_window_bounds_the_context(tmp_path: Path) -> None:
    checkpoint = variant(tmp_path, "mistral", sliding_window=64)
    assert config_of(export(checkpoint, tmp_path / "mlc"))["context_window_size"] == 64
    with pytest.raises(Unsupported, match="looks 64 back"):
        export(checkpoint, tmp_path / "larger", context=65)


@pytest.mark.parametrize(
    ("name", "change", "error", "reason"),
    [
        ("model.layers.3.mlp.up_proj.weight", lambda t: t / 0, InvalidModelFile, "NaN or infinite"),
        ("lm_head.weight", lambda t: t * 1e6, BadInput, "65504"),
        ("model.layers.1.self_attn.q_proj.weight", lambda t: t[:32], InvalidModelFile, "q_proj.*not"),
        ("model.layers.1.self_attn.q_proj.weight", None, InvalidModelFile, "q_proj.weight is missing"),
    ],
)
def test_bad_weights(
    tiny: Checkpoint, tmp_path: Path, name: str, change: Any, error: type[AlightError], reason: str
) -> None:
    changed = ((n, change(t) if n == name else t) for n, t in tiny.tensors() if change or n != name)
    bad = tiny.with_tensors(changed, tmp_path / "bad")
    with pytest.raises(error, match=reason):
        export(bad, tmp_path / "mlc")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bad", "tiny"]


def test_a_tokenizer_that_nothing_reads(tiny: Checkpoint, tmp_path: Path) -> None:
    (tiny.folder / "tokenizer.json").write_text('{"model": {"type": "Abacus"}}')
    with pytest.raises(InvalidModelFile, match="tokenizer of tiny is not usable"):
        export(tiny, tmp_path / "mlc")


def test_float32_holds_what_float16_cannot(tiny: Checkpoint, tmp_path: Path) -> None:
    large = tiny.with_tensors(
        ((n, t * 1e6 if n == "lm_head.weight" else t) for n, t in tiny.tensors()), tmp_path / "large"
    )
    got = mlc_folder.weights(export(large, tmp_path / "mlc", "q4f32_1"))
    assert abs(got["lm_head.weight"]).max() > 65504


def test_a_full_disk(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(DiskFull, match="needed"):
        export(tiny, tmp_path / "mlc")
    assert [f.name for f in tmp_path.iterdir()] == ["tiny"]


def test_a_disk_that_fills_up(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_checkpoints.llama_config(hidden_size=256, intermediate_size=512)
    larger = Checkpoint.open(tiny_checkpoints.save(tmp_path / "larger", config))
    monkeypatch.setattr("alight_converters.export.mlc._check_room", lambda *_: None)
    with pytest.raises(DiskFull):
        export(larger, small_disk / "mlc", "q0f16")
    assert list(small_disk.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.mlc import export
def progress(what, done, total):
    if done == total:  # all weights are written, and the config is not
        os.kill(os.getpid(), signal.SIGKILL)
export(Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2]), progress=progress)
"""


def test_killed_while_writing(tiny: Checkpoint, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tiny.folder), str(tmp_path / "mlc")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = {f.name for f in tmp_path.iterdir()} - {"tiny"}
    assert len(left) == 1
    assert left.pop().startswith(".mlc-")
    assert export(tiny, tmp_path / "mlc").is_dir()


def context_of(checkpoint: Checkpoint, folder: Path) -> ExportContext:
    def calibration() -> Calibration:
        raise AssertionError("MLC needs no calibration")

    return ExportContext(folder, Weights(checkpoint, folder), calibration)


def test_the_export_of_a_recipe(tiny: Checkpoint, tmp_path: Path) -> None:
    made = MLC(type="q0f32", libraries=()).run(context_of(tiny, tmp_path))
    assert made == tmp_path / "q0f32"
    assert {f.name for f in made.iterdir()} == FILES


def test_a_library_for_this_machine(tiny: Checkpoint, tmp_path: Path) -> None:
    made = MLC(type="q4f32_1", context=64).run(context_of(tiny, tmp_path))
    libraries = json.loads((made / "lib" / "libraries.json").read_text())
    assert [(entry["quantization"], entry["context"]) for entry in libraries.values()] == [("q4f32_1", 64)]
    assert all((made / "lib" / entry["file"]).is_file() for entry in libraries.values())


def test_a_library_that_nobody_knows_leaves_nothing(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="toaster"):
        MLC(libraries=("toaster",)).run(context_of(tiny, tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["tiny"]


def test_no_compiler(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alight_converters.mlc_export.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"pip install 'alight\[convert-mlc\]'"):
        MLC().run(context_of(tiny, tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["tiny"]


def test_settings_of_a_recipe() -> None:
    assert MLC.of_type(None).type == "q4f16_1"
    assert MLC.of_type("Q4F32_1").label == "q4f32_1"
    with pytest.raises(ValidationError, match="'q8' is not known"):
        MLC(type="q8")
