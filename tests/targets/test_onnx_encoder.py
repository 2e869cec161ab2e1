"""Encoder models in ONNX form: what transformers computes from the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_edits
import pytest
import torch
from tokenizers import Tokenizer

from alight.artifact import Artifact, Description
from alight.errors import BadInput, ContextExceeded, EngineError, InvalidModelFile, Unsupported
from alight.target import LoadOptions, Model
from alight_targets.onnx import OnnxTarget

TEXTS = ["the small boat", "a map and the sea and a boat", "sea"]


def load(folder: Path) -> Model:
    files = {file.name: file for file in folder.iterdir() if file.is_file()}
    return OnnxTarget().load(Artifact("tiny", "", Description("onnx"), (), files), LoadOptions(threads=1))


def test_embeddings_are_those_of_transformers(tmp_path: Path) -> None:
    bert = onnx_edits.encoder(tmp_path / "bert", ranks=False)
    tokenizer = Tokenizer.from_file(str(tmp_path / "bert" / "tokenizer.json"))
    with load(tmp_path / "bert") as model, torch.no_grad():
        for pooling in ("", "mean", "cls", "last"):
            found = model.embed(TEXTS, pooling=pooling)
            for text, vector in zip(TEXTS, found, strict=True):
                states = bert(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].numpy()
                pooled = {"cls": states[0], "last": states[-1]}.get(pooling, states.mean(axis=0))
                assert vector == pytest.approx(pooled / np.linalg.norm(pooled), abs=1e-5)
        assert model.rerank("boat", ["boat", "map"])[0] == pytest.approx(1, abs=1e-5), "by their embeddings"


def test_a_folder_may_say_how_it_pools(tmp_path: Path) -> None:
    onnx_edits.encoder(tmp_path / "bert", ranks=False)
    (tmp_path / "bert" / "1_Pooling").mkdir()
    (tmp_path / "bert" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with load(tmp_path / "bert") as model:
        assert np.allclose(model.embed(TEXTS), model.embed(TEXTS, pooling="cls"))


def test_rerankers_give_the_scores_of_their_head(tmp_path: Path) -> None:
    bert = onnx_edits.encoder(tmp_path / "bert", ranks=True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "bert" / "tokenizer.json"))
    with load(tmp_path / "bert") as model, torch.no_grad():
        for text, score in zip(TEXTS, model.rerank("a small sea", TEXTS), strict=True):
            pair = tokenizer.encode("a small sea", text)
            ids, kinds = torch.tensor([pair.ids]), torch.tensor([pair.type_ids])
            assert score == pytest.approx(float(bert(ids, token_type_ids=kinds).logits[0, 0]), abs=1e-5)
        with pytest.raises(Unsupported, match="ranks texts and does not embed"):
            model.embed(TEXTS)


def test_an_encoder_does_not_write(tmp_path: Path) -> None:
    onnx_edits.encoder(tmp_path / "bert", ranks=False)
    model = load(tmp_path / "bert")
    with pytest.raises(Unsupported, match="embeds texts and writes none"):
        model.complete("the")
    with pytest.raises(BadInput, match="empty"):
        model.embed([""])
    with pytest.raises(ContextExceeded, match="needs 18 tokens but the context holds 16"):
        model.embed(["sea " * 16])
    assert model.tokenize("the small boat") == [4, 5, 6]
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.embed(["sea"])


def test_damaged_encoders_say_so(tmp_path: Path) -> None:
    onnx_edits.encoder(tmp_path / "bert", ranks=False)
    (tmp_path / "bert" / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(InvalidModelFile, match=r"cannot load model\.onnx"):
        load(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidModelFile, match=r"tokenizer\.json"):
        load(tmp_path / "bert")
