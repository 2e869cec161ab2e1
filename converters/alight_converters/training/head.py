"""A causal language model in two halves, so that a loss can come between them: the decoder and the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alight.errors import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SplitModel:
    """The decoder and the head of a model that `transformers` loaded. It shares the model's weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        whole: Any = model
        tied = model.config.tie_word_embeddings
        self._head: nn.Module = whole.get_input_embeddings() if tied else whole.get_output_embeddings()
        config = model.config.get_text_config()
        self._divisor: float = getattr(config, "logits_scaling", None) or 1.0  # Granite
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self._check()

    @property
    def weight(self) -> Tensor:
        """The head's weight, (vocabulary, width)."""
        weight: Tensor = self._head.weight  # type: ignore[assignment]
        return weight

    def hidden(self, tokens: Tensor) -> Tensor:
        """What goes into the head, (rows, length, width), for tokens of shape (rows, length)."""
        last: Tensor = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return last

    def layers(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same, and the output of the embedding and of each layer."""
        done = self.model.base_model(input_ids=tokens, use_cache=False, output_hidden_states=True)
        return done.last_hidden_state, done.hidden_states

    def finish(self, logits: Tensor) -> Tensor:
        """What some families do with the product of hidden state and head."""
        logits = logits / self._divisor if self._divisor != 1 else logits
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    @torch.no_grad()
    def _check(self) -> None:
        """A family that does more between decoder and logits than is known here must not be trained wrongly."""
        tokens = torch.arange(1, 9, device=self.weight.device)[None]
        with evaluating(self.model):
            ours = self.finish(F.linear(self.hidden(tokens), self.weight)).float()
            theirs = self.model(input_ids=tokens, use_cache=False).logits.float()
        if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max())):
            raise Unsupported(
                f"{self.model.config.model_type!r} models do more than a linear head after the decoder",
                hint="Teach alight_converters/training/head.py what it is.",
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, no gradient checkpointing."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
