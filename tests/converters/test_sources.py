"""Any source opens as a checkpoint: folders, GGUF files and adapters, and what is wrong with bad ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints
import tiny_tokenizers
import torch
from gguf_scores import HARD, kl, load, reference
from sentencepiece import SentencePieceProcessor

from alight import api
from alight.errors import BadInput, InvalidModelFile, Unsupported
from alight.quantization import quantized
from alight.shape import Shape, shape_of_checkpoint
from alight_converters.checkpoint import Checkpoint, write
from alight_converters.export.gguf import export
from alight_converters.sources import open_source

FAMILIES = tiny_checkpoints.families()
TOKENS = torch.randint(3, 256, (40,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_from_gguf_and_back(name: str, tmp_path: Path) -> None:
    config, tokens = FAMILIES[name]
    checkpoint = Checkpoint.open(tiny_checkpoints.save(tmp_path / "tiny", config, tokens=tokens))
    (file,) = export(checkpoint, tmp_path / "tiny.gguf", "F32")
    again = open_source(file, tmp_path / "work")
    if config.model_type != "mistral":  # in GGUF, a Mistral is a Llama
        assert again.config["model_type"] == config.model_type
    assert kl(reference(checkpoint, TOKENS), reference(again, TOKENS)) < 1e-9
    old, new = checkpoint.tokenizer(), again.tokenizer()
    for text in HARD:
        if "<|user|>" not in text:  # a GGUF does not say that Phi-3's special tokens swallow spaces
            assert new.encode(text) == old.encode(text), text
    (second,) = export(again, tmp_path / "again.gguf", "F32")
    with load(file) as one, load(second) as two:
        scores = [m.score(TOKENS, distribution=True).distribution for m in (one, two)]
    assert np.allclose(scores[0], scores[1], atol=1e-5)


def test_smollm2_from_its_gguf_and_back(smollm2: Checkpoint, tmp_path: Path) -> None:
    source = api.resolve("builtin:smollm2").weights[0]
    (file,) = export(smollm2, tmp_path / "smollm2.gguf", "F32")
    with load(source) as theirs, load(file) as ours:
        for text in HARD:
            assert ours.tokenize(text, special=True, bos=True) == theirs.tokenize(
                text, special=True, bos=True
            )
            assert smollm2.tokenizer().encode(text) == theirs.tokenize(text, special=True, bos=True), text
        assert ours.template.render([{"role": "user", "content": "Hi"}]) == theirs.template.render(
            [{"role": "user", "content": "Hi"}]
        )
        tokens = theirs.tokenize("The quick brown fox jumps over the lazy dog, and 12 dogs sleep on.")
        got = ours.score(tokens, distribution=True).distribution
    assert got is not None
    assert kl(reference(smollm2, tokens), got) < 1e-4


def test_a_gguf_in_parts(tiny: Checkpoint, tmp_path: Path) -> None:
    parts = export(tiny, tmp_path / "parts" / "tiny.gguf", "F32", shard=300_000)
    again = open_source(parts[0].parent, tmp_path / "work")
    assert all(torch.equal(again.tensor(name), tensor) for name, tensor in tiny.tensors())
    parts[1].unlink()
    with pytest.raises(InvalidModelFile, match="1 are missing"):
        open_source(parts[0], tmp_path / "other")


def test_a_gguf_is_read_once(tiny: Checkpoint, tmp_path: Path) -> None:
    (file,) = export(tiny, tmp_path / "tiny.gguf", "F16")
    first = open_source(file, tmp_path / "work")
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    second = open_source(file, tmp_path / "work")
    assert second.folder == first.folder
    assert (second.folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_modelscope_folder(tiny: Checkpoint, tmp_path: Path) -> None:
    (tiny.folder / "configuration.json").write_text('{"framework": "pytorch", "task": "text-generation"}')
    (tiny.folder / ".msc").write_bytes(b"\x80")
    assert open_source(tiny.folder, tmp_path / "work").folder == tiny.folder


def internlm2(llama: Checkpoint, folder: Path) -> Path:
    """The same model as InternLM2 stores it: other names, queries, keys and values in one matrix by groups."""
    groups, per_group = llama.config["num_key_value_heads"], 2
    names = {
        "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm", "mlp.gate_proj": "feed_forward.w1",
        "post_attention_layernorm": "ffn_norm", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
        "embed_tokens": "tok_embeddings", "lm_head": "output",
    }  # fmt: skip

    def tensors():  # type: ignore[no-untyped-def]
        for name, tensor in llama.tensors():
            if "q_proj" in name:
                q, k, v = (
                    llama.tensor(name.replace("q_proj", f"{x}_proj")).unflatten(0, (groups, -1, 16))
                    for x in "qkv"
                )
                assert q.shape[1] == per_group
                fused = torch.cat([q, k, v], dim=1).flatten(0, 2)
                yield name.replace("self_attn.q_proj", "attention.wqkv"), fused
            elif "k_proj" not in name and "v_proj" not in name:
                for ours, theirs in names.items():
                    name = name.replace(ours, theirs)
                yield name, tensor.clone()

    config = {k: v for k, v in llama.config.items() if k not in ("rope_parameters", "architectures")}
    config |= {
        "model_type": "internlm2", "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.X"}, "bias": False,
        "rope_theta": 50000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }  # fmt: skip
    write(folder, config, tensors())
    (folder / "modeling_internlm2.py").write_text("raise SystemExit('foreign code ran')")
    (folder / "tokenizer.model").write_bytes(tiny_tokenizers.sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def test_internlm2_without_its_code(tmp_path: Path) -> None:
    config, tokens = FAMILIES["llama2"]
    llama = Checkpoint.open(tiny_checkpoints.save(tmp_path / "llama", config, tokens=tokens))
    folder = internlm2(llama, tmp_path / "internlm2")
    opened = open_source(folder, tmp_path / "work")
    assert kl(reference(llama, TOKENS), reference(opened, TOKENS)) < 1e-9
    truth = SentencePieceProcessor(model_proto=tiny_tokenizers.sentencepiece_model())
    (file,) = export(opened, tmp_path / "model.gguf", "F32")
    with load(file) as model:
        for text in HARD:
            if text and "<" not in text:
                assert model.tokenize(text) == truth.encode(text), text
                assert opened.tokenizer().encode(text, add_special_tokens=False) == truth.encode(text), text
        assert kl(reference(llama, TOKENS), model.score(TOKENS, distribution=True).distribution) < 1e-4


def test_gemma3_with_vision_is_read_as_its_text_model(tmp_path: Path) -> None:
    config, tokens = FAMILIES["gemma3"]
    text = Checkpoint.open(tiny_checkpoints.save(tmp_path / "text", config, tokens=tokens))
    tensors = [(n.replace("model.", "model.language_model.", 1), t) for n, t in text.tensors()]
    tensors.append(("model.vision_tower.embedding.weight", torch.zeros(4, 4)))
    whole = write(
        tmp_path / "whole", {"model_type": "gemma3", "text_config": text.config}, tensors, like=text
    )
    assert kl(reference(text, TOKENS), reference(open_source(whole.folder, tmp_path / "work"), TOKENS)) < 1e-9


def test_the_shapes_of_foreign_checkpoints_are_those_of_what_they_become(tmp_path: Path) -> None:
    def shape(folder: Path) -> Shape:
        return shape_of_checkpoint({file.name: file for file in folder.iterdir()})

    llama = Checkpoint.open(tiny_checkpoints.save(tmp_path / "llama", tiny_checkpoints.llama_config()))
    found, wanted = shape(internlm2(llama, tmp_path / "internlm2")), shape(llama.folder)
    assert not found.tied and not wanted.tied
    assert found.parameters == wanted.parameters
    assert quantized(found, "Q6_K").weight_bytes == quantized(wanted, "Q6_K").weight_bytes

    config, tokens = FAMILIES["gemma3"]
    text = Checkpoint.open(tiny_checkpoints.save(tmp_path / "text", config, tokens=tokens))
    tensors = [(n.replace("model.", "model.language_model.", 1), t) for n, t in text.tensors()]
    tensors.append(("model.vision_tower.embedding.weight", torch.zeros(4, 4)))
    # As the real ones: what is the family's default is left out.
    left_out = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {key: value for key, value in text.config.items() if key not in left_out}
    write(tmp_path / "whole", {"model_type": "gemma3", "text_config": sizes}, tensors, like=text)
    found, wanted = shape(tmp_path / "whole"), shape(text.folder)
    assert found.tied
    assert replace(found, tensors=()) == replace(wanted, tensors=())
    assert found.parameters == wanted.parameters, "without the part that sees"
    for kind in ("Q4_K_M", "Q4_0"):
        assert quantized(found, kind).weight_bytes == quantized(wanted, kind).weight_bytes


def test_old_rope_settings(tmp_path: Path) -> None:
    config, tokens = FAMILIES["llama3"]
    new = Checkpoint.open(tiny_checkpoints.save(tmp_path / "new", config, tokens=tokens))
    rope = dict(new.config["rope_parameters"])
    theta = rope.pop("rope_theta")
    old = {k: v for k, v in new.config.items() if k != "rope_parameters"}
    before = write(
        tmp_path / "old", old | {"rope_theta": theta, "rope_scaling": rope}, new.tensors(), like=new
    )
    files = [export(c, tmp_path / f"{c.folder.name}.gguf")[0].read_bytes() for c in (new, before)]
    assert (
        files[0].replace(b"\x03\x00\x00\x00\x00\x00\x00\x00new", b"\x03\x00\x00\x00\x00\x00\x00\x00old")
        == files[1]
    )


def test_bad_sources(tiny: Checkpoint, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(BadInput, match="does not exist"):
        open_source(tmp_path / "nothing", work)
    with pytest.raises(BadInput, match="not a GGUF file"):
        open_source(tiny.folder / "config.json", work)
    with pytest.raises(BadInput, match="it has no"):
        open_source(work.parent, work)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(InvalidModelFile):
        open_source(tmp_path / "bad.gguf", work)
    for name in ("a", "b"):
        (tmp_path / "two").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "bad.gguf", tmp_path / "two" / f"{name}.gguf")
    with pytest.raises(BadInput, match="holds 2 GGUF files"):
        open_source(tmp_path / "two", work)
    config = json.loads((tiny.folder / "config.json").read_text())
    (tiny.folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(Unsupported, match="'mamba' is not a family") as error:
        open_source(tiny.folder, work)
    assert "docs/add-a-family.md" in error.value.hint
