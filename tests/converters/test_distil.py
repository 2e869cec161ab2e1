"""Each way to distil, on tiny checkpoints: the student gets nearer to its teacher, as its paper says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoints
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from alight.errors import BadInput
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.distil.distil import Distil
from alight_converters.distil.features import even_pairs
from alight_converters.passes import Context
from alight_converters.training.sampling import sample, until_stop

SHORT = {"steps": 40, "batch": 8, "learning_rate": 3e-3, "precision": "float32"}
SMALLER = {"num_hidden_layers": 2, "hidden_size": 32}


@pytest.fixture
def context(tiny: Checkpoint, random_rows: Calibration, tmp_path: Path) -> Context:
    return Context(tmp_path / "made", tmp_path / "work", tiny, random_rows)


@pytest.fixture
def shallower(tiny: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The tiny checkpoint without its last layer: a pruned student."""
    kept = ((n, t) for n, t in tiny.tensors() if not n.startswith("model.layers.3."))
    return tiny.with_tensors(kept, tmp_path / "shallower", num_hidden_layers=3)


@torch.no_grad()
def divergence(student: Checkpoint, teacher: Checkpoint, rows: torch.Tensor) -> float:
    """Mean KL(teacher || student) per token."""
    p, q = (F.log_softmax(c.load()(rows).logits, -1) for c in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_pruned_student_recovers(tiny: Checkpoint, shallower: Checkpoint, context: Context) -> None:
    before = divergence(shallower, tiny, context.calibration.rows)
    made = Distil(training={**SHORT, "steps": 120}).run(shallower, context)
    assert divergence(made, tiny, context.calibration.rows) < before / 4
    assert made.config["num_hidden_layers"] == 3
    assert made.tokenizer().get_vocab() == tiny.tokenizer().get_vocab()


def test_the_losses_are_the_divergence_measured_from_outside(
    tiny: Checkpoint, shallower: Checkpoint, context: Context
) -> None:
    """One step over all rows: its loss is the mean divergence of all predicted tokens before it."""
    Distil(training={**SHORT, "steps": 1, "batch": 16}).run(shallower, context)
    p, q = (
        F.log_softmax(c.load()(context.calibration.rows).logits[:, :-1], -1).detach()
        for c in (tiny, shallower)
    )
    assert context.measured["losses"] == [pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)]


@pytest.mark.parametrize("method", ["reverse_kl", "jsd"])
def test_other_divergences_recover_too(
    method: str, tiny: Checkpoint, shallower: Checkpoint, context: Context
) -> None:
    before = divergence(shallower, tiny, context.calibration.rows)
    made = Distil(method={"kind": "logit", "divergence": method}, training=SHORT).run(shallower, context)
    assert divergence(made, tiny, context.calibration.rows) < before


def test_stored_top_k_of_the_whole_vocabulary_trains_like_the_teacher_at_work(
    shallower: Checkpoint, context: Context, tmp_path: Path
) -> None:
    Distil(training=SHORT).run(shallower, context)
    stored = Context(tmp_path / "b", tmp_path / "work-b", context.source, context.calibration)
    Distil(method={"kind": "logit", "top_k": 512}, training=SHORT).run(shallower, stored)
    assert stored.measured["losses"] == pytest.approx(context.measured["losses"], rel=1e-3)


def test_stored_top_k_recovers_and_is_computed_once(
    tiny: Checkpoint, shallower: Checkpoint, context: Context, tmp_path: Path
) -> None:
    before = divergence(shallower, tiny, context.calibration.rows)
    method = {"kind": "logit", "top_k": 128}
    made = Distil(method=method, training=SHORT).run(shallower, context)
    assert divergence(made, tiny, context.calibration.rows) < before / 2
    (shard,) = context.work.glob("teacher-*/*")
    written = shard.stat().st_mtime_ns
    assert shard.stat().st_size == pytest.approx(16 * 31 * 128 * (2 + 4), rel=0.01)
    again = Context(tmp_path / "again", context.work, tiny, context.calibration)
    Distil(method=method, training=SHORT).run(shallower, again)
    assert shard.stat().st_mtime_ns == written


def test_features_reach_a_student_of_another_width(tiny: Checkpoint, context: Context) -> None:
    made = Distil(method="feature", random_student=SMALLER, training=SHORT).run(tiny, context)
    losses = context.measured["losses"]
    assert losses[-1] < 0.6 * losses[0]
    assert made.config["hidden_size"] == 32
    assert not any("projector" in name for name in made.shapes), "projectors are for training only"


def test_layers_are_paired_evenly_from_first_to_last() -> None:
    assert even_pairs(2, 4) == [(1, 2), (2, 4)]
    assert even_pairs(3, 30) == [(1, 10), (2, 20), (3, 30)]
    assert even_pairs(4, 4) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_behaviour_learns_what_the_teacher_writes(
    tiny: Checkpoint, shallower: Checkpoint, context: Context
) -> None:
    """At temperature 0 there is one text per prompt: the student learns to write it itself."""
    method = {"kind": "behaviour", "prompt_tokens": 8, "new_tokens": 8, "temperature": 0}
    made = Distil(method=method, training={**SHORT, "steps": 150}).run(shallower, context)
    prompts = context.calibration.rows[:, :8]
    expected, before, after = (
        sample(c.load(), prompts, 8, seed=0, temperature=0)[:, 8:] for c in (tiny, shallower, made)
    )
    assert float((before == expected).float().mean()) < 0.6
    assert float((after == expected).float().mean()) > 0.95


def test_behaviour_learns_recorded_reasoning_word_for_word(
    tiny: Checkpoint, context: Context, tmp_path: Path
) -> None:
    """Prompts of a file: one answered by the teacher, one with a recorded response; prompts are not learned."""
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "alight loads", "response": "<think>a model</think> any model"},
        {"prompt": "a much longer prompt that the teacher answers"},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    method = {"kind": "behaviour", "prompts": file, "new_tokens": 6}
    made = Distil(method=method, training={**SHORT, "steps": 80, "batch": 2}).run(tiny, context)
    tokenizer, model = made.tokenizer(), made.load()
    prompt = tokenizer("alight loads", return_tensors="pt")["input_ids"]
    written = sample(model, prompt, 40, seed=0, temperature=0, stop=1)
    assert tokenizer.decode(written[0, prompt.shape[1] :]) == "<think>a model</think> any model</s>"


def test_a_line_that_is_no_prompt_is_named(tiny: Checkpoint, context: Context, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n{"question": "not"}\n')
    with pytest.raises(BadInput, match=r"line 2 of .* is not a prompt"):
        Distil(method={"kind": "behaviour", "prompts": file}, training=SHORT).run(tiny, context)


def test_on_policy_recovers_and_lambda_says_how_often_the_student_writes(
    tiny: Checkpoint, shallower: Checkpoint, context: Context, tmp_path: Path
) -> None:
    before = divergence(shallower, tiny, context.calibration.rows)
    method = {"kind": "on_policy", "divergence": "forward_kl", "prompt_tokens": 4}
    made = Distil(method={**method, "share": 0.5}, training=SHORT).run(shallower, context)
    assert divergence(made, tiny, context.calibration.rows) < before / 1.5

    def losses(name: str, **options: object) -> list[float]:
        other = Context(tmp_path / name, tmp_path / f"w-{name}", tiny, context.calibration)
        Distil(training={**SHORT, "steps": 6}, **options).run(shallower, other)
        return list(other.measured["losses"])

    never, always = (
        losses("never", method={**method, "share": 0}),
        losses("always", method={**method, "share": 1}),
    )
    assert never == losses("logit"), "with lambda 0 it is supervised distillation"
    assert all(a != b for a, b in zip(never, always, strict=True))


def test_lora_trains_little_and_is_merged(tiny: Checkpoint, shallower: Checkpoint, context: Context) -> None:
    before = divergence(shallower, tiny, context.calibration.rows)
    made = Distil(lora={"rank": 4}, training=SHORT).run(shallower, context)
    assert divergence(made, tiny, context.calibration.rows) < before
    assert made.shapes == shallower.shapes
    for name, weight in made.tensors():
        change = (weight - shallower.tensor(name)).double()
        if "_proj" in name:
            rank = int(torch.linalg.matrix_rank(change, atol=1e-5))
            assert 1 <= rank <= 4, name
        else:
            assert not change.any(), name


def test_the_result_keeps_the_students_dtype(random_rows: Calibration, tmp_path: Path) -> None:
    folder = tiny_checkpoints.save(tmp_path / "half", tiny_checkpoints.llama_config(), dtype=torch.bfloat16)
    half = Checkpoint.open(folder)
    context = Context(tmp_path / "made", tmp_path / "work", half, random_rows)
    made = Distil(random_student=SMALLER, training={**SHORT, "steps": 2, "precision": "bf16"}).run(
        half, context
    )
    assert {t.dtype for _, t in made.tensors()} == {torch.bfloat16}


def test_another_vocabulary_is_refused_and_the_first_difference_named(
    tiny: Checkpoint, context: Context, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny.with_tensors(tiny.tensors(), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    by_token = tokenizer["model"]["vocab"]
    first, second = (next(t for t, number in by_token.items() if number == n) for n in (300, 301))
    by_token[first], by_token[second] = 301, 300
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(BadInput, match="of 512 and 512 tokens: token 300 is"):
        Distil(teacher=other, training=SHORT).run(tiny, context)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "logits"},
        {"method": {"kind": "logit", "share": 0.5}},
        {"method": {"kind": "logit", "temperature": 0}},
        {"method": {"kind": "logit", "divergence": "jsd", "jsd_beta": 1}},
        {"student": "a", "random_student": {}},
        {"training": {"learning_rate": 0}},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Distil.model_validate(options)


def test_a_size_that_the_config_lacks_is_refused(tiny: Checkpoint, context: Context) -> None:
    with pytest.raises(BadInput, match=r"no 'layers'\nSizes it has: .*num_hidden_layers"):
        Distil(random_student={"layers": 2}, training=SHORT).run(tiny, context)


def test_text_after_the_stop_token_is_not_learned() -> None:
    tokens = torch.tensor([[1, 5, 6, 1, 7], [5, 5, 5, 5, 5]])
    assert until_stop(tokens, 1, stop=1).tolist() == [
        [False, True, True, True, False],
        [False, True, True, True, True],
    ]
