"""The search: what it measures, what it chooses, and the Pareto front. On figures, so that thousands are tried."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

import alight
from alight import devices, planner
from alight.builder import BuildRequest, Candidate
from alight.errors import BadInput, DoesNotFit
from alight.evaluate import Quality, Speed
from alight.gguf import read_header
from alight.planner import Form, Prediction
from alight_converters.search import SEARCHED, choose, pareto, search, speed_on

HERE = replace(devices.profile("raspberry-pi-5-8gb"), id="this")


@pytest.fixture(scope="module")
def source(smollm2_file: Path) -> alight.Artifact:
    return alight.Artifact.loose(smollm2_file)


@pytest.fixture(scope="module")
def plan(smollm2_file: Path) -> list[Prediction]:
    """All forms of the real model on a Pi."""
    shape = planner.shape_of_gguf([read_header(smollm2_file)])
    types = [n for t in SEARCHED for n in ([t] if t == "Q8_0" else [t, f"{t}+imatrix"])]
    return planner.plan(shape, HERE, types=types)


class World:
    """What measuring would tell: predictions that are off, by type for speed and by form for KL; memory a little."""

    def __init__(self, plan: list[Prediction], seed: int) -> None:
        chance = random.Random(seed)
        speed_off = chance.uniform(0.5, 2)
        kl_off = chance.uniform(0.2, 5)
        memory_off = chance.uniform(0.96, 0.99)
        speeds = {Form.parse(p.quantization).type: speed_off * chance.uniform(0.85, 1.15) for p in plan}
        kls = {Form.parse(p.quantization).type: kl_off * chance.uniform(0.7, 1.4) for p in plan}
        self.measured: list[str] = []
        self.candidates = {}
        for p in plan:
            kind = Form.parse(p.quantization).type
            kl = p.kl * kls[kind] * (chance.uniform(0.85, 1.1) if "+" in p.quantization else 1)
            decode = p.decode * speeds[kind]
            memory = p.memory.total * memory_off * chance.uniform(0.99, 1.01)
            self.candidates[p.quantization] = Candidate(
                p.quantization,
                p.memory.weights,
                p,
                Quality(9, 5.0, kl, kl, 0.9),
                Speed(1.0, decode, 1.0, 9, 1),
                0.1,
                memory_bytes=int(memory),
            )

    def measure(self, p: Prediction) -> Candidate:
        self.measured.append(p.quantization)
        return self.candidates[p.quantization]


def request(source: alight.Artifact, **limits: object) -> BuildRequest:
    return BuildRequest(source=source, device=HERE, name="x", **limits)  # type: ignore[arg-type]


def test_the_search_finds_what_measuring_everything_finds(
    plan: list[Prediction], source: alight.Artifact
) -> None:
    same = measured = 0
    for seed in range(200):
        world = World(plan, seed)
        limits = request(source, max_kl=random.Random(seed).choice([0.002, 0.01, 0.03, 0.1, 0.3, 2.0]))
        found = choose(search(plan, limits, world.measure), limits)[0]
        same += found is choose(list(world.candidates.values()), limits)[0]
        measured += len(world.measured)
        assert len(set(world.measured)) == len(world.measured), "nothing is measured twice"
    assert same >= 190
    assert measured / 200 < 0.6 * len(plan), "the point of a search"


def test_the_search_keeps_what_may_fit_and_lets_measuring_decide(
    smollm2_file: Path, plan: list[Prediction], source: alight.Artifact
) -> None:
    """Limits on memory that lie between what is predicted and what is measured."""
    shape = planner.shape_of_gguf([read_header(smollm2_file)])
    types = [p.quantization for p in plan]
    same, dropped = 0, 0
    for seed in range(200):
        world = World(plan, seed)
        chance = random.Random(seed)
        memory = chance.choice([c.memory_bytes for c in world.candidates.values()]) + 1
        limits = request(source, max_kl=chance.choice([0.002, 0.01, 0.03]), max_memory=memory)
        kept = planner.plan(shape, HERE, types=types, max_memory=memory)
        found = choose(search(kept, limits, world.measure), limits)[0]
        best = choose(list(world.candidates.values()), limits)[0]
        same += found is best
        dropped += best.prediction.memory.total > memory
    assert dropped > 50, "the best is often one that was predicted not to fit"
    assert same >= 190


def test_a_form_that_loses_nothing_is_a_form(plan: list[Prediction], source: alight.Artifact) -> None:
    world = World(plan, 0)
    for name, c in world.candidates.items():
        world.candidates[name] = replace(c, quality=replace(c.quality, kl_mean=0.0))
    assert search(plan, request(source, max_kl=0.01), world.measure)


def test_a_speed_that_was_measured_counts_for_the_twin(
    plan: list[Prediction], source: alight.Artifact
) -> None:
    world = World(plan, 0)
    search(plan, request(source, max_kl=100.0), world.measure)
    fastest = max(world.candidates.values(), key=lambda c: speed_on(c, request(source)))
    assert Form.parse(fastest.quantization).type in {Form.parse(m).type for m in world.measured}


def candidate(name: str, size: int, kl: float, speed: float, memory: int = 0) -> Candidate:
    prediction = Prediction(name, planner.Memory(size, 1, 1, 1), 512, 1.0, speed, "arithmetic")
    return Candidate(
        name, size, prediction, Quality(9, 5.0, kl, kl, 0.9), Speed(1.0, speed, 1.0, 9, 1), 0.1, memory_bytes=memory
    )  # fmt: skip


def test_pareto_front(source: alight.Artifact) -> None:
    best, middle, small = (
        candidate("Q8_0", 140, 0.01, 10),
        candidate("Q4_K_M", 100, 0.05, 15),
        candidate("Q2_K", 60, 0.9, 12),
    )
    beaten, equal = candidate("Q5_0", 120, 0.06, 14), candidate("Q4_K_S", 100, 0.05, 15)
    found = pareto([best, beaten, middle, small, equal], request(source))
    assert found == (best, middle, small, equal)


def test_equal_speed_means_less_loss(source: alight.Artifact) -> None:
    plain, weighed = candidate("Q4_0", 90, 0.04, 20.2), candidate("Q4_0+imatrix", 90, 0.02, 20.0)
    assert choose([plain, weighed], request(source))[0] is weighed


def test_reasons_tell_which_limit_binds(source: alight.Artifact) -> None:
    close, far = candidate("Q8_0", 140, 0.01, 10), candidate("Q4_0", 90, 0.2, 30)
    chosen, reason = choose([close, far], request(source, min_speed=20))
    assert chosen is far
    assert "loses least, 0.2 (Q8_0 would, at 0.01, but not within the limit on speed)" in reason
    with pytest.raises(BadInput, match=r"Q4_0 comes nearest with 30\.0"):
        choose([close, far], request(source, min_speed=50))
    with pytest.raises(DoesNotFit, match="Q4_0, the smallest that was built, needs about 150 MB but 100 MB"):
        heavy = [replace(c, memory_bytes=c.size * 10**6 + 60_000_000) for c in (close, far)]
        choose(heavy, request(source, max_memory=100_000_000))


def test_streams_count(source: alight.Artifact) -> None:
    one = candidate("Q8_0", 140, 0.01, 30)
    many = replace(one, stream_speed=8.0)
    assert speed_on(one, request(source)) == 30
    assert speed_on(many, request(source, streams=4)) == 8
