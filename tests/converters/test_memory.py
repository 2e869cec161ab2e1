"""Out of memory: fewer rows at a time where that is possible, and errors that name what would fit where not.

A model "runs out of memory" here by a hook that fails, as torch does, when more tokens than some go into it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

from alight.errors import BadInput
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.distil.distil import Distil
from alight_converters.memory import RowsAtOnce
from alight_converters.passes import Context
from alight_converters.quantize import sensitivity
from alight_converters.quantize.imatrix import collect
from alight_converters.training.sampling import sample, sample_what_fits

Limit = Callable[[int], None]


@pytest.fixture
def at_most(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Models that have memory for so many rows times tokens."""
    forward = LlamaModel.forward

    def limit(tokens: int) -> None:
        def limited(self: LlamaModel, input_ids: Any = None, **more: Any) -> Any:
            size = input_ids if input_ids is not None else more["inputs_embeds"][..., 0]
            kept = more.get("past_key_values")
            if size.numel() + (size.shape[0] * kept.get_seq_length() if kept else 0) > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(self, input_ids, **more)

        monkeypatch.setattr(LlamaModel, "forward", limited)

    return limit


def context_of(tiny: Checkpoint, rows: Calibration, folder: Path) -> Context:
    return Context(folder / "made", folder / "work", tiny, rows)


def test_stored_teachers_are_the_same_with_fewer_rows_at_once(
    tiny: Checkpoint,
    random_rows: Calibration,
    tmp_path: Path,
    at_most: Limit,
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = {"steps": 1, "batch": 2, "precision": "float32"}
    distil = Distil.model_validate({"method": {"kind": "logit", "top_k": 8}, "training": training})
    plain = context_of(tiny, random_rows, tmp_path / "plain")
    distil.run(tiny, plain)
    at_most(2 * 32)
    fewer = context_of(tiny, random_rows, tmp_path / "fewer")
    distil.run(tiny, fewer)
    assert (
        "the teacher's top 8 over rows of 32 tokens: 4 rows at once run out of memory, trying 2"
        in caplog.text
    )
    assert fewer.measured["losses"] == pytest.approx(plain.measured["losses"], rel=1e-5)
    at_most(16)
    with pytest.raises(BadInput, match=r"teacher's top 8 .* runs out of memory with one row at a time"):
        distil.run(tiny, context_of(tiny, random_rows, tmp_path / "none"))


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ({"kind": "behaviour", "prompt_tokens": 4, "new_tokens": 8}, "writing 8 tokens after each prompt"),
        ({"kind": "on_policy", "prompt_tokens": 4, "share": 1.0}, "writing the student's own text"),
    ],
)
def test_texts_are_written_with_fewer_rows_at_once(
    method: dict[str, Any], what: str, tiny: Checkpoint, random_rows: Calibration, tmp_path: Path, at_most: Limit,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    training = {"steps": 1, "batch": 8, "rows_at_once": 1, "precision": "float32"}
    distil = Distil.model_validate({"method": method, "training": training})
    at_most(2 * 32)
    distil.run(tiny, context_of(tiny, random_rows, tmp_path / "fewer"))
    assert f"{what}: 8 rows at once run out of memory, trying 4" in caplog.text
    at_most(8)
    with pytest.raises(BadInput, match=f"{what} runs out of memory with one row at a time"):
        distil.run(tiny, context_of(tiny, random_rows, tmp_path / "none"))


def test_parts_that_stop_early_are_padded(tiny: Checkpoint, at_most: Limit) -> None:
    model: LlamaForCausalLM = tiny.load()
    prompts = torch.randint(2, 100, (6, 4), generator=torch.Generator().manual_seed(0))
    whole = sample(model, prompts, 8, seed=1, temperature=0)
    at_most(2 * 12)
    rows = RowsAtOnce(64, "it", "")
    assert torch.equal(sample_what_fits(rows, model, prompts, 8, seed=1, temperature=0), whole)
    assert rows.rows == 2
    stop = int(whole[0, 5])
    stopped = sample_what_fits(RowsAtOnce(1, "it", ""), model, prompts, 8, seed=1, temperature=0, stop=stop)
    assert (stopped[0, 6:] == stop).all(), "the first one stopped early"


def test_sampled_calibration_takes_fewer_rows_at_once(tiny: Checkpoint, at_most: Limit) -> None:
    at_most(4 * 16)
    assert Calibration.sampled(tiny, 10, 16).rows.shape == (10, 16)
    at_most(8)
    with pytest.raises(BadInput, match="sampling calibration text of 16 tokens runs out of memory") as caught:
        Calibration.sampled(tiny, 10, 16)
    assert "calibration.length below 16" in caught.value.hint


def test_activation_passes_name_what_would_fit(
    tiny: Checkpoint, random_rows: Calibration, at_most: Limit
) -> None:
    at_most(2 * 32)
    with pytest.raises(
        BadInput, match="calibration: 8 rows of 32 tokens at once run out of memory"
    ) as caught:
        collect(tiny, random_rows, batch=8)
    assert caught.value.hint == "2 rows of 32 tokens would fit."
    at_most(10)
    with pytest.raises(BadInput, match="calibration: a row of 32 tokens at once run") as caught:
        collect(tiny, random_rows)
    assert caught.value.hint.endswith("set calibration.length to 8.")


def test_the_gradient_of_a_row(tiny: Checkpoint, random_rows: Calibration, at_most: Limit) -> None:
    matrix = collect(tiny, random_rows)
    at_most(10)
    with pytest.raises(BadInput, match=r"the gradient of a row of 32 tokens runs out of memory\nRows .* 16"):
        sensitivity.measure(tiny, random_rows, matrix)


def test_no_batch_size_helps_the_optimizer(
    tiny: Checkpoint, random_rows: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(_: nn.Module) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    distil = Distil.model_validate({"training": {"steps": 1, "batch": 2, "precision": "float32"}})
    with pytest.raises(
        BadInput, match=r"distil: AdamW's state of 0\.\d M weights runs out of memory"
    ) as caught:
        distil.run(tiny, context_of(tiny, random_rows, tmp_path))
    assert "lora" in caught.value.hint


def test_other_errors_stay_what_they_are() -> None:
    def fails(rows: int) -> None:
        raise RuntimeError(f"{rows} rows are wrong")

    with pytest.raises(RuntimeError, match="4 rows are wrong"):
        RowsAtOnce(4, "it", "").run(fails)
