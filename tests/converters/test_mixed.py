"""Mixed precision: within the budget, better than one type for all, and by an estimate that can be trusted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alight.errors import BadInput
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.quantize import ggml, sensitivity
from alight_converters.quantize.imatrix import Imatrix, collect
from alight_converters.quantize.mixed import Option, choose_types, solve

TYPES = ("Q4_0", "Q5_0", "Q8_0")
SIZES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}


@pytest.fixture
def matrix(tiny: Checkpoint, random_rows: Calibration) -> Imatrix:
    return collect(tiny, random_rows)


def total(mix: dict[str, Option]) -> tuple[int, float]:
    return sum(o.bytes for o in mix.values()), sum(o.kl for o in mix.values())


sensitive = st.lists(
    st.tuples(st.integers(1, 50), st.lists(st.floats(0, 1), min_size=3, max_size=3)), min_size=1, max_size=4
)


@given(sensitive, st.floats(1.0, 2.0))
def test_the_mix_is_near_the_best_one(tensors: list[tuple[int, list[float]]], room: float) -> None:
    options = {
        str(i): [Option(t, SIZES[t] * blocks, kl) for t, kl in zip(TYPES, kls, strict=True)]
        for i, (blocks, kls) in enumerate(tensors)
    }
    budget = int(room * sum(18 * blocks for blocks, _ in tensors))
    mix = solve(options, budget)
    used, loss = total(mix)
    assert used <= budget
    every = [dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*options.values())]
    affordable = [m for m in every if total(m)[0] <= budget]
    best = min(total(m)[1] for m in affordable)
    assert loss <= best + max(max(kls) for _, kls in tensors), "optimal but for one step"
    for kind in TYPES:
        same = {name: next(o for o in choices if o.type == kind) for name, choices in options.items()}
        if total(same)[0] <= budget:
            assert loss <= total(same)[1]


def test_bytes_go_to_the_sensitive() -> None:
    options = {
        "calm": [Option("Q4_0", 18, 0.1), Option("Q8_0", 34, 0.0)],
        "sensitive": [Option("Q4_0", 18, 9.0), Option("Q8_0", 34, 0.0)],
    }
    mix = solve(options, 60)
    assert {name: o.type for name, o in mix.items()} == {"calm": "Q4_0", "sensitive": "Q8_0"}
    with pytest.raises(BadInput, match="smallest mix"):
        solve(options, 35)


def test_types_within_a_budget(tiny: Checkpoint, random_rows: Calibration, matrix: Imatrix) -> None:
    measured: dict[str, object] = {}
    floats = sum(4 * shape[0] for shape in tiny.shapes.values() if len(shape) == 1)
    weights = sum(shape[0] * shape[1] for shape in tiny.shapes.values() if len(shape) == 2)
    budget = floats + weights * 5 // 8
    chosen = choose_types(tiny, random_rows, matrix, budget, types=TYPES, measured=measured)
    assert set(chosen) == set(matrix.sums) | {"token_embd.weight"}
    assert len(set(chosen.values())) > 1
    assert 0.97 * budget < int(str(measured["bytes"])) <= budget
    assert json.loads(json.dumps(measured)) == measured
    with pytest.raises(BadInput, match=r"smallest mix of types has .* the budget is"):
        choose_types(tiny, random_rows, matrix, budget // 2, types=TYPES)
    with pytest.raises(BadInput, match=r"columns, which none of Q4_K can divide"):
        choose_types(tiny, random_rows, matrix, budget, types=("Q4_K",))
    with pytest.raises(BadInput, match="unknown tensor type"):
        choose_types(tiny, random_rows, matrix, budget, types=("Q4",))


def test_the_estimate_is_near_the_measured_kl(
    tiny: Checkpoint, random_rows: Calibration, matrix: Imatrix
) -> None:
    fishers = sensitivity.measure(tiny, random_rows, matrix)
    names = sensitivity.matrices(tiny)
    model = tiny.load()
    with torch.no_grad():
        exact = model(random_rows.rows).logits.log_softmax(-1)
    for name in ("blk.0.attn_v.weight", "blk.1.ffn_down.weight", "blk.3.ffn_up.weight", "output.weight"):
        weight = model.get_parameter(names[name])
        kept = weight.detach().clone()
        # Noise, smaller than a type's: the estimate is that of small changes.
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.003
        with torch.no_grad():
            weight.add_(noise)
            other = model(random_rows.rows).logits.log_softmax(-1)
            weight.copy_(kept)
        kl = float((exact.exp() * (exact - other)).sum(-1).mean())
        assert fishers[name].kl(noise.numpy()) == pytest.approx(kl, rel=0.5), name


def test_rounding_is_llama_cpps_own(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = random.standard_normal((4, 512)).astype(np.float32)
    even, skewed = np.ones(512, np.float32), random.random(512).astype(np.float32) ** 4
    assert not ggml.fits("Q4_K", 576) and ggml.fits("Q4_0", 576)
    assert ggml.size("Q4_0", 512) == 288
    for kind in ("Q4_0", "Q3_K", "IQ2_XS"):
        plain, weighted = (ggml.rounded(weights, kind, w) - weights for w in (even, skewed))
        assert (skewed * weighted**2).sum() < (skewed * plain**2).sum(), kind
