"""The MLC target: the conformance suite, libraries chosen and refused, and a backend whose sequences do not mix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlc_models
import numpy as np
import pytest

from alight.artifact import Artifact
from alight.errors import BadInput, DoesNotFit, InvalidModelFile, TargetUnavailable
from alight.target import LoadOptions
from alight.testing import check_target
from alight_converters.sources import open_source
from alight_targets.mlc import MlcTarget
from alight_targets.mlc.backend import TvmBackend
from alight_targets.mlc.fit import Sizes, fit
from alight_targets.mlc.libraries import choose

PROMPTS = (
    "The capital of France is", "Once upon a time, in a village by the sea,", "def fibonacci(n):",
    "Water boils at 100 degrees because", "1, 2, 3, 4,",
)  # fmt: skip
CONTEXT = 512


@pytest.fixture(scope="module")
def smollm2(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in q4f16_1, with a library for this machine."""
    root = tmp_path_factory.mktemp("mlc")
    return mlc_models.build(open_source(smollm2_file, root / "source"), root / "smollm2", "q4f16_1", CONTEXT)


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[TvmBackend]:
    backend = mlc_models.backend(smollm2)
    yield backend
    backend.close()


def prompts(folder: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in PROMPTS]


def test_the_target_conforms(smollm2: Path) -> None:
    check_target(MlcTarget(), Artifact.loose(smollm2))


def test_greedy_tokens_are_those_of_transformers(
    engine: TvmBackend, smollm2: Path, smollm2_file: Path, tmp_path: Path
) -> None:
    model = mlc_models.reference(open_source(smollm2_file, tmp_path), "q4f16_1")
    for prompt in prompts(smollm2):
        assert mlc_models.continued(engine, prompt, 12) == mlc_models.greedy(model, prompt, 12)


def test_sequences_decoded_together_do_not_mix(engine: TvmBackend, smollm2: Path) -> None:
    some = prompts(smollm2)[:4]
    alone = [mlc_models.continued(engine, prompt, 8) for prompt in some]
    rows = []
    for number, prompt in enumerate(some):
        engine.add(number)
        rows.append(engine.extend(number, prompt))
    together = [[int(row.argmax())] for row in rows]
    for _ in range(7):
        logits = engine.decode(range(4), [found[-1] for found in together])
        for found, row in zip(together, logits, strict=True):
            found.append(int(row.argmax()))
    for number in range(4):
        engine.remove(number)
    assert together == alone


def test_a_fork_and_a_rewind_continue_as_the_whole_prompt_does(engine: TvmBackend) -> None:
    tokens = list(range(300, 360))
    engine.add(0)
    whole = engine.extend(0, tokens)
    assert engine.fork(0, 1, 40)
    engine.rewind(0, 25)
    for number, kept in ((0, 25), (1, 40)):
        np.testing.assert_allclose(engine.extend(number, tokens[kept:]), whole, atol=2e-2)
    both = engine.decode([0, 1], [7, 7])
    np.testing.assert_allclose(both[0], both[1], atol=2e-2)
    engine.remove(1)
    engine.remove(0)


def test_the_logits_of_a_text_are_those_of_its_beginnings(engine: TvmBackend) -> None:
    tokens = list(range(400, 500))
    rows = np.concatenate(list(engine.logits(tokens)))
    assert rows.shape == (100, engine.vocabulary)
    engine.add(0)
    np.testing.assert_allclose(engine.extend(0, tokens[:71]), rows[70], atol=2e-2)
    engine.remove(0)


def change_library(folder: Path, copy: Path, **changes: object) -> Path:
    """A folder with the same list of libraries but for `changes`, and nothing else."""
    (copy / "lib").mkdir(parents=True)
    entries = json.loads((folder / "lib" / "libraries.json").read_text())
    changed = {name: entry | changes for name, entry in entries.items()}
    (copy / "lib" / "libraries.json").write_text(json.dumps(changed))
    return copy


def test_a_library_of_a_newer_tvm_is_refused(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetUnavailable, match=r"compiled by tvm 9\.1"):
        choose(change_library(smollm2, tmp_path / "newer", tvm="9.1"))


def test_a_missing_library_names_the_command(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetUnavailable, match="alight build SOURCE --format mlc"):
        choose(tmp_path)
    other = {"kind": "llvm", "mtriple": "riscv64-linux-gnu"}
    with pytest.raises(TargetUnavailable, match="no MLC library for this"):
        choose(change_library(smollm2, tmp_path / "other", host=other))
    with pytest.raises(InvalidModelFile, match="is missing"):
        choose(change_library(smollm2, tmp_path / "gone"))
    with pytest.raises(TargetUnavailable):
        choose(change_library(smollm2, tmp_path / "cpu", needs=["avx9"]))


def test_a_damaged_list_or_weights_are_named(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libraries.json").write_text('{"x": 1}')
    with pytest.raises(InvalidModelFile, match=r"libraries\.json is damaged"):
        choose(tmp_path)
    with pytest.raises(InvalidModelFile, match=r"the weights of .* cannot be loaded"):
        library = choose(smollm2)
        TvmBackend(tmp_path, library, context=64, slots=1, threads=1)


def test_the_context_is_what_memory_and_library_allow(smollm2: Path) -> None:
    sizes = Sizes.of(smollm2)
    assert sizes.parameters == 134_515_008
    plenty = 1 << 34
    assert fit(sizes, LoadOptions(slots=4), 2048, plenty) == (2048, 4)
    assert fit(sizes, LoadOptions(context=256), 2048, plenty)[0] == 256
    context, slots = fit(sizes, LoadOptions(), 8192, sizes.weights + (250 << 20))
    assert context < 4096 and slots >= 1
    with pytest.raises(BadInput, match="compiled for"):
        fit(sizes, LoadOptions(context=4096), 2048, plenty)
    with pytest.raises(DoesNotFit):
        fit(sizes, LoadOptions(context=2048), 2048, sizes.weights)
