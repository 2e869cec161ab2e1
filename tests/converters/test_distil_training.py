"""The training loop: what is killed goes on, parts of a batch add up, and two processes do the work of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alight.errors import BadInput
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.distil.distil import Distil
from alight_converters.passes import Context

TRAINING = {"steps": 30, "batch": 8, "learning_rate": 3e-3, "precision": "float32", "save_every": 5}

# Runs a pass on saved inputs and prints one line per step; the losses go to a file at the end.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.distil.distil import Distil
from alight_converters.passes import Context

folder = Path(sys.argv[1])
torch.set_num_threads(1)
source = Checkpoint.open(folder / "tiny")
rows = torch.load(folder / "rows.pt")
context = Context(folder / "made", folder / "work", source, Calibration(rows, "random"),
                  progress=lambda what, done, total: print(done, flush=True))
Distil(**json.loads(sys.argv[2])).run(source, context)
(folder / f"losses-{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}.json").write_text(
    json.dumps(context.measured["losses"]))
"""


@pytest.fixture
def script(tiny: Checkpoint, random_rows: Calibration, tmp_path: Path) -> Path:
    torch.save(random_rows.rows, tmp_path / "rows.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def in_process(tiny: Checkpoint, rows: Calibration, folder: Path, options: dict[str, object]) -> Context:
    torch.set_num_threads(1)
    context = Context(folder / "expected", folder / "work-expected", tiny, rows)
    Distil.model_validate(options).run(tiny, context)
    return context


@pytest.mark.parametrize("method", ["logit", "on_policy"])
def test_a_killed_run_goes_on_with_the_same_losses(
    method: str, script: Path, tiny: Checkpoint, random_rows: Calibration, tmp_path: Path
) -> None:
    kind = {"kind": method} | ({"prompt_tokens": 8} if method == "on_policy" else {})
    options = {"method": kind, "random_student": {"num_hidden_layers": 2}, "training": TRAINING}
    command = [sys.executable, script, tmp_path, json.dumps(options)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == 13:
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "made").exists()

    steps = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert int(steps[0]) > 10, "it went on from a saved state"
    expected = in_process(tiny, random_rows, tmp_path, options)
    assert json.loads((tmp_path / "losses-0.json").read_text()) == expected.measured["losses"]
    for name, weight in Checkpoint.open(tmp_path / "made").tensors():
        assert torch.equal(weight, Checkpoint.open(expected.folder).tensor(name)), name


def test_two_processes_do_the_work_of_one(
    script: Path, tiny: Checkpoint, random_rows: Calibration, tmp_path: Path
) -> None:
    options = {
        "method": {"kind": "logit", "top_k": 64},
        "random_student": {"num_hidden_layers": 2},
        "training": {**TRAINING, "steps": 8, "rows_at_once": 3},
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, script, tmp_path, json.dumps(options)], check=True, env=environment)
    expected = in_process(tiny, random_rows, tmp_path, options)
    for rank in (0, 1):
        losses = json.loads((tmp_path / f"losses-{rank}.json").read_text())
        assert losses == pytest.approx(expected.measured["losses"], rel=1e-4)
    for name, weight in Checkpoint.open(tmp_path / "made").tensors():
        assert torch.allclose(weight, Checkpoint.open(expected.folder).tensor(name), atol=1e-3), name


@pytest.mark.parametrize("changes", [{"rows_at_once": 3}, {"gradient_checkpointing": True}])
def test_settings_that_save_memory_change_nothing(
    changes: dict[str, object], tiny: Checkpoint, random_rows: Calibration, tmp_path: Path
) -> None:
    student = {"random_student": {"num_hidden_layers": 2}}
    training = {**TRAINING, "steps": 6}
    plain = in_process(tiny, random_rows, tmp_path / "a", {**student, "training": training})
    saving = in_process(tiny, random_rows, tmp_path / "b", {**student, "training": training | changes})
    assert saving.measured["losses"] == pytest.approx(plain.measured["losses"], rel=1e-4)


# A limit on the address space, of which a part is for 8 rows of 256 tokens and not for 64.
SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint
from alight_converters.distil.distil import Distil
from alight_converters.passes import Context

torch.set_num_threads(1)
folder = Path(sys.argv[1])
source = Checkpoint.open(folder / "tiny")
def run(name, rows_at_once, batch):
    training = dict(steps=1, batch=batch, rows_at_once=rows_at_once, precision="float32")
    own = folder / sys.argv[2]
    own.mkdir(exist_ok=True)
    context = Context(own / name, own / f"work-{name}", source, Calibration(torch.ones(64, 256).long(), "ones"))
    Distil(random_student={"num_hidden_layers": 2}, training=training).run(source, context)
    return context.measured["rows_at_once"]
run("warm", None, 1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
if sys.argv[2] == "fewer":
    rows = run("fewer", None, 64)
    assert 1 <= rows < 64, rows
    sys.exit()
try:
    run("fixed", 64, 64)
except ValueError as error:
    print(error)
"""


def test_out_of_memory_means_fewer_rows_at_once_or_an_error_that_names_them(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    def short_of_memory(which: str) -> subprocess.CompletedProcess[str]:
        """In a process of its own: what one run leaves in pieces is no room for another."""
        command = [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path), which]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    fewer = short_of_memory("fewer").stderr
    assert "training on 64 rows of 256 tokens at once runs out of memory" in fewer
    assert "rows at once fit: set rows_at_once to " in short_of_memory("fixed").stdout


def test_the_state_of_another_run_is_not_used(
    tiny: Checkpoint, random_rows: Calibration, tmp_path: Path
) -> None:
    def run(name: str, rate: float) -> None:
        context = Context(tmp_path / name, tmp_path / "work", tiny, random_rows)
        Distil(training={**TRAINING, "learning_rate": rate, "steps": 6}).run(tiny, context)

    run("a", 1e-3)
    with pytest.raises(BadInput, match="is the state of another training run"):
        run("b", 2e-3)
