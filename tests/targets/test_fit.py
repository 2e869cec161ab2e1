"""Fit: a model that needs more memory than there is gets a smaller context or clear numbers, never a killed process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alight import devices
from alight.artifact import Artifact
from alight.errors import DoesNotFit
from alight.target import LoadOptions
from alight_targets.llama_cpp import CpuTarget

LIMITED = """
import resource, sys
import alight
from alight.errors import AlightError
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    with alight.load(sys.argv[1], context=int(sys.argv[2]) or None, threads=1) as model:
        print("context", model.info.context, model.complete("Hello", max_tokens=2).usage.completion_tokens)
except AlightError as error:
    print("refused:", error)
"""


def load_within(file: Path, context: int, limit: int) -> str:
    """What a process says that may use `limit` bytes of address space."""
    command = [sys.executable, "-c", LIMITED, str(file), str(context), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the process died: {done.stderr[-500:]}"
    return done.stdout


def test_enough_memory_gives_the_default_context(smollm2_file: Path) -> None:
    assert load_within(smollm2_file, 0, 4_000_000_000).startswith("context 4096")


def test_too_little_memory_shrinks_the_default(smollm2_file: Path) -> None:
    said = load_within(smollm2_file, 0, 450_000_000)
    assert said.startswith("context ")
    assert 512 <= int(said.split()[1]) < 4096


@pytest.mark.parametrize("limit", range(300_000_000, 700_000_000, 50_000_000))
def test_whatever_the_limit_the_process_lives(smollm2_file: Path, limit: int) -> None:
    assert load_within(smollm2_file, 0, limit).startswith(("context", "refused"))


def test_a_context_that_was_asked_for_is_refused_with_numbers(smollm2_file: Path) -> None:
    said = load_within(smollm2_file, 8192, 500_000_000)
    assert said.startswith("refused: llama with a context of 8192 tokens needs about")
    assert "MB are free" in said


def test_what_was_predicted_is_checked_once_it_is_loaded(
    smollm2: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([4_000_000_000, 5_000_000])  # before and after: somebody else took it
    monkeypatch.setattr(devices, "available_memory", lambda: next(free))
    with pytest.raises(DoesNotFit, match="needs about 4,011 MB but 4,000 MB are free"):
        CpuTarget().load(smollm2, LoadOptions(context=256, slots=1))
