"""Tokenizers in a GGUF beyond those that the families' tests have."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import tiny_tokenizers
from gguf_scores import HARD, load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from alight.errors import Unsupported
from alight.gguf import read_header
from alight_converters.checkpoint import Checkpoint
from alight_converters.export.gguf import export
from alight_converters.export.gguf_tokenizer import vocabulary

ROWS = tiny_tokenizers.SIZE


def checkpoint(folder: Path, tokens: dict[str, Any], **settings: Any) -> Checkpoint:
    config = tiny_checkpoints.llama_config(vocab_size=ROWS, num_hidden_layers=1)
    made = Checkpoint.open(tiny_checkpoints.save(folder / "tiny", config, tokens=tokens))
    file = made.folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return made


def unigram() -> dict[str, Any]:
    """As in a T5-like `tokenizer.json`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train(tiny_tokenizers.TEXTS, trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def test_unigram(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, unigram())
    theirs = made.tokenizer()
    (file,) = export(made, tmp_path / "model.gguf", "F32")
    assert read_header(file).metadata["tokenizer.ggml.model"] == "t5"
    with load(file) as model:
        for text in (
            "Hello world",
            "alight runs models on small devices",
            "我想在设备上",
            "a b c 123",
            "the</s>end",
        ):
            assert model.tokenize(text, special=True) == theirs.encode(text, add_special_tokens=False), text


def test_a_prefix_at_the_start_only_keeps_chats_exact(tmp_path: Path) -> None:
    """llama.cpp would put a space after every special token, which tokenizers of the scheme "first" do not."""
    tokens = copy.deepcopy(tiny_tokenizers.pieces("llama2"))
    tokens["normalizer"] = None
    tokens["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    made = checkpoint(tmp_path, tokens)
    theirs = made.tokenizer()
    (file,) = export(made, tmp_path / "model.gguf", "F32")
    with load(file) as model:
        for text in HARD:
            chat = f"<s>{text}</s>{text}"
            assert model.tokenize(chat, special=True) == theirs.encode(chat, add_special_tokens=False), text


def test_skipped_merges_do_not_matter_where_merges_make_every_word(tmp_path: Path) -> None:
    tokens = copy.deepcopy(tiny_tokenizers.byte_level("tekken"))
    tokens["model"]["ignore_merges"] = False
    made = checkpoint(tmp_path, tokens)
    assert vocabulary(made).metadata["tokenizer.ggml.pre"] == "tekken"
    tokens["model"]["merges"] = tokens["model"]["merges"][:-1]
    made = checkpoint(tmp_path / "other", tokens)
    with pytest.raises(Unsupported, match="ignore_merges=False"):
        vocabulary(made)


def test_tokens_that_end_a_text(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, tiny_tokenizers.byte_level("smollm"), eos_token="<|im_end|>")
    generation = made.folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [3, 1, 2]}))
    found = vocabulary(made).metadata
    ends = [found[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")]
    assert ends == [3, 1, 2]


@pytest.mark.parametrize(
    ("settings", "file", "content", "wanted"),
    [
        ({"chat_template": "from settings"}, "", "", "from settings"),
        (
            {"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]},
            "",
            "",
            "yes",
        ),
        ({}, "chat_template.json", '{"chat_template": "from json"}', "from json"),
        ({"chat_template": "old"}, "chat_template.jinja", "from jinja", "from jinja"),
        ({}, "", "", None),
    ],
)
def test_where_the_chat_template_is(
    tmp_path: Path, settings: dict[str, Any], file: str, content: str, wanted: str | None
) -> None:
    made = checkpoint(tmp_path, tiny_tokenizers.byte_level("smollm"), **settings)
    (made.folder / "chat_template.jinja").unlink()
    if file:
        (made.folder / file).write_text(content)
    assert vocabulary(made).metadata.get("tokenizer.chat_template") == wanted


def test_the_name_decides_over_spaces_in_phi3_only(tmp_path: Path) -> None:
    strips = checkpoint(tmp_path / "a", tiny_tokenizers.pieces("phi3"))
    assert vocabulary(strips).model_name == "Phi-3 tiny"
    keeps = checkpoint(tmp_path / "b", tiny_tokenizers.pieces("llama2"))
    renamed = keeps.with_tensors(keeps.tensors(), tmp_path / "my-phi-3-clone")
    assert vocabulary(renamed).model_name == "my-Phi 3-clone"
