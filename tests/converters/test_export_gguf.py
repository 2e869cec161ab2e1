"""Checkpoints exported as GGUF: llama.cpp computes what transformers does, on every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoints
import torch
from gguf_scores import HARD, kl, load, reference

from alight_converters.checkpoint import Checkpoint
from alight_converters.export.gguf import export

FAMILIES = tiny_checkpoints.families()


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Path]:
    """A tiny checkpoint of each family, and its GGUF in float32."""
    config, tokens = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = Checkpoint.open(tiny_checkpoints.save(folder / "tiny", config, tokens=tokens))
    (file,) = export(checkpoint, folder / "tiny.gguf", "F32")
    return checkpoint, file


def test_same_logits(family: tuple[Checkpoint, Path]) -> None:
    checkpoint, file = family
    tokens = torch.randint(3, 256, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = reference(checkpoint, tokens)
    with load(file) as model:
        got = model.score(tokens, distribution=True).distribution
    assert got is not None
    assert kl(wanted, got) < 1e-4  # keys and values are kept in float16
    assert kl(wanted[:, ::-1], got) > 0.01  # the measure would notice


def test_same_tokens(family: tuple[Checkpoint, Path]) -> None:
    checkpoint, file = family
    theirs = checkpoint.tokenizer()
    with load(file) as model:
        for text in HARD:
            assert model.tokenize(text, special=True) == theirs.encode(text, add_special_tokens=False), text
            assert model.tokenize(text, special=True, bos=True) == theirs.encode(text), text
