"""SmoothQuant: the same function, and activations that fit 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted_outliers import with_outliers

from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.passes import Context
from alight_converters.quantize.smoothquant import SmoothQuant


def logits(checkpoint: Checkpoint, rows: Calibration, *, int8: bool = False) -> torch.Tensor:
    """With `int8`: weights rounded per row, activations per token, as W8A8 runtimes do."""
    model = checkpoint.load()
    if int8:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "proj" in name:
                module.weight.data = rounded(module.weight.data)
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    with torch.no_grad():
        found: torch.Tensor = model(rows.rows).logits
    return found


def rounded(values: torch.Tensor) -> torch.Tensor:
    step = values.abs().amax(-1, keepdim=True) / 127
    return (values / step).round() * step


def test_outliers_move_into_the_weights(tiny: Checkpoint, random_rows: Calibration, tmp_path: Path) -> None:
    before = with_outliers(tiny, tmp_path / "before")
    told = Context(tmp_path / "after", tmp_path / "work", before, random_rows)
    after = SmoothQuant().run(before, told)
    exact = logits(before, random_rows)
    assert torch.allclose(logits(after, random_rows), exact, atol=1e-4, rtol=1e-4)
    plain, better = (logits(c, random_rows, int8=True) for c in (before, after))
    assert (better - exact).square().mean() < 0.5 * (plain - exact).square().mean()
    assert told.measured["outliers"]["after"] < told.measured["outliers"]["before"] / 2


def test_strength_is_a_share() -> None:
    with pytest.raises(ValueError, match="strength"):
        SmoothQuant(strength=1.5)
