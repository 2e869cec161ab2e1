"""What llama.cpp and transformers make of the same tokens and texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from alight import plugins
from alight.artifact import Artifact
from alight.target import LoadOptions, Model
from alight_converters.checkpoint import Checkpoint

HARD = [
    "Hello world", " leading  and   trailing spaces  ", "tabs\tand\nnewlines\n\n\n  x\r\ny", "", " ", "\n",
    "It's we'LL they'Re I'd 'Tis", "3 33 333 3333 33333.5 1,234,567 ½ ٣٤", "naïve café Привет ΑΒΓ",
    "我想在apple工作1314151天～ 不客气！", "🚀 (normal) 😶‍🌫️ (multiple emojis) ✅🦙",
    "def f(x):\n    return x**2  # no\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<start_of_turn>user\nHi<end_of_turn>\n",
    "<|user|>  two spaces<|end|>\n x</s> y", "a<tool_call>b</s><s> c", "------======= !!!!!!???", "x" * 200,
    "ABCdef HTTPServer camelCase Größe ÀÉÎ",
]  # fmt: skip


def load(file: Path) -> Model:
    artifact = Artifact.loose(file)
    return plugins.choose_target(artifact).load(artifact, LoadOptions(context=128))


def reference(checkpoint: Checkpoint, tokens: list[int]) -> np.ndarray:
    """The log-softmax of transformers after each token but the last."""
    with torch.inference_mode():
        logits = checkpoint.load()(torch.tensor([tokens])).logits[0, :-1]
    return torch.log_softmax(logits.double(), -1).numpy()


def kl(wanted: np.ndarray, got: np.ndarray) -> float:
    return float((np.exp(wanted) * (wanted - got)).sum(-1).mean())
