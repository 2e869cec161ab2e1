"""Exported encoders compute what transformers computes, at any batch and length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints
import torch
from onnx_scores import session
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from alight.errors import BadInput, Unsupported
from alight_converters.export.onnx_encoder import export_encoder

SIZES = {
    "vocab_size": tiny_checkpoints.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def save(folder: Path, model: torch.nn.Module) -> Path:
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.5 if weight.dim() == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    tiny_checkpoints.tokenizer().save_pretrained(folder)
    return folder


def check(model: torch.nn.Module, folder: Path, output: str, *, types: bool) -> None:
    """Two batches of other sizes than the one that was traced; one of them padded."""
    run = session(folder / "model.onnx")
    generator = np.random.default_rng(0)
    for texts, length in ((1, 7), (3, 40)):
        tokens = generator.integers(2, 500, (texts, length))
        mask = np.ones_like(tokens)
        mask[0, length // 2 :] = 0
        feed = {"input_ids": tokens, "attention_mask": mask}
        if types:
            feed["token_type_ids"] = generator.integers(0, 2, (texts, length))
        with torch.inference_mode():
            wanted = model.eval()(**{k: torch.from_numpy(v) for k, v in feed.items()})[output].numpy()
        (got,) = run.run([output], feed)
        if output == "last_hidden_state":  # what is masked is not looked at
            wanted, got = wanted[mask == 1], got[mask == 1]
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_an_encoder_gives_its_hidden_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES))
    folder = export_encoder(save(tmp_path / "bert", model), tmp_path / "onnx")
    check(model, folder, "last_hidden_state", types=True)
    assert (folder / "tokenizer.json").is_file()
    assert not list(folder.glob("*.safetensors"))


def test_a_reranker_gives_its_scores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=1))
    check(model, export_encoder(save(tmp_path / "bert", model), tmp_path / "onnx"), "logits", types=True)


def test_positions_that_begin_after_the_padding_token(tmp_path: Path) -> None:
    """As RoBERTa counts them, by the tokens themselves; it has no token types."""
    torch.manual_seed(0)
    model = XLMRobertaModel(XLMRobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1))
    folder = export_encoder(save(tmp_path / "roberta", model), tmp_path / "onnx")
    check(model, folder, "last_hidden_state", types=False)


def test_decoders_and_empty_folders_are_refused(tmp_path: Path) -> None:
    saved = tiny_checkpoints.save(tmp_path / "llama", tiny_checkpoints.llama_config())
    with pytest.raises(Unsupported, match="decoder"):
        export_encoder(saved, tmp_path / "onnx")
    with pytest.raises(BadInput, match=r"config\.json"):
        export_encoder(tmp_path, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
