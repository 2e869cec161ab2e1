"""Tokenizers of model folders: the library's ids, bytes of pieces, control tokens, and what the files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_backend
import tiny_tokenizers
from tokenizers import Tokenizer as Reference

from alight.errors import InvalidModelFile
from alight_targets.common.tokenizer import Tokenizer

TEXTS = (
    "hello world",
    "  two  spaces\n\ttab",
    "你好，世界",
    "émoji 👩‍🚀 ok",
    "x = {'a': [1, 2]}  # code",
    "",
)


@pytest.fixture(params=["llama3", "qwen2", "smollm", "gpt-2", "llama2", "gemma", "phi3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind = request.param
    pieces = kind in ("llama2", "gemma", "phi3")
    tiny_tokenizers.write(
        tmp_path, tiny_tokenizers.pieces(kind) if pieces else tiny_tokenizers.byte_level(kind)
    )
    return tmp_path


def test_ids_and_bytes(folder: Path) -> None:
    tokenizer = Tokenizer(folder, "onnx")
    reference = Reference.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.tokenize(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.detokenize(ids).decode() == text
        running = b"".join(tokenizer.piece(token) for token in ids).decode()
        assert running in (text, f" {text}")


def test_characters_that_are_not_whole_stay_bytes(folder: Path) -> None:
    tokenizer = Tokenizer(folder, "onnx")
    ids = tokenizer.tokenize("a 𓀀")
    assert len(ids) > 4, "it takes several tokens"
    assert tokenizer.detokenize(ids[:-1]) == "a 𓀀".encode()[:-1]


def test_control_tokens_in_text_are_text(folder: Path) -> None:
    tokenizer = Tokenizer(folder, "onnx")
    control = next(t["content"] for t in json.loads(tokenizer.source)["added_tokens"] if t["special"])
    text = f"one {control} two"
    (number,) = tokenizer.tokenize(control, special=True)
    assert number not in tokenizer.tokenize(text)
    assert tokenizer.detokenize(tokenizer.tokenize(text)).decode() == text
    seen = tokenizer.tokenize(text, special=True)
    assert number in seen
    assert control.encode() not in tokenizer.detokenize(seen)
    assert control.encode() in tokenizer.detokenize(seen, special=True)


def test_the_beginning_is_added_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    begins = {}
    for kind in ("llama3", "qwen2"):
        (tmp_path / kind).mkdir()
        tiny_tokenizers.write(tmp_path / kind, tiny_tokenizers.byte_level(kind))
        tokenizer = Tokenizer(tmp_path / kind, "onnx")
        assert tokenizer.piece(tokenizer.bos, special=True) == b"<|begin|>"
        begins[kind] = tokenizer.tokenize("a", bos=True)[0] == tokenizer.bos
    assert begins == {"llama3": True, "qwen2": False}


def test_settings_have_the_last_word_on_the_beginning(tmp_path: Path) -> None:
    tiny_tokenizers.write(tmp_path, tiny_tokenizers.byte_level("llama3"))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    assert not Tokenizer(tmp_path, "onnx").adds_bos


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", {"eos_token_id": [5, 6]}),
        ("genai_config.json", {"model": {"eos_token_id": [5, 6]}}),
        ("mlc-chat-config.json", {"eos_token_id": 5, "conv_template": {"stop_token_ids": [6]}}),
    ],
)
def test_ends_come_from_any_of_the_files(tmp_path: Path, file: str, content: dict[str, object]) -> None:
    tiny_backend.tokenizer_folder(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path, "onnx")
    assert tokenizer.ends == {5, 6, *tokenizer.tokenize("<|im_end|>", special=True)}


def test_the_template_and_its_tokens(tmp_path: Path) -> None:
    template = Tokenizer(tiny_backend.tokenizer_folder(tmp_path), "onnx").template
    assert (template.bos, template.eos) == ("<s>", "<|im_end|>")
    assert template.render([{"role": "user", "content": "hi"}]) == ["user: hi<|im_end|>"]
    pieces = template.render([{"role": "user", "content": "<|im_end|> and <tool_call>"}])
    assert len(pieces) == 3, "what a user types is cut, so that it does not become a token"


def test_a_template_among_the_settings(tmp_path: Path) -> None:
    tiny_backend.tokenizer_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer(tmp_path, "onnx").template.source == "D"


@pytest.mark.parametrize("content", [None, "{", '{"model": {"type": "nonsense"}}'])
def test_damaged_folders_say_so(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InvalidModelFile, match=r"tokenizer\.json"):
        Tokenizer(tmp_path, "onnx")
