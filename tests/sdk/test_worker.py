"""A model in a process of its own: the same interface, and no process left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import psutil
import pytest
from gguf_writer import tiny
from test_server_helpers import LIMIT, wait_until

from alight import api
from alight.artifact import Artifact
from alight.errors import BadInput, DoesNotFit, EngineCrashed, EngineError
from alight.pushed import PushedChunks
from alight.server.worker_model import WorkerModel
from alight.target import Availability, Chunk, Completion, LoadOptions, Model, Sampling, Target
from alight.testing import check_target


class InWorker(Target):
    """A target whose models run in workers."""

    formats = frozenset({"gguf"})

    def __init__(self, name: str) -> None:
        self.name = name

    def probe(self) -> Availability:
        return Availability(True, "")

    def load(self, artifact: Artifact, options: LoadOptions) -> Model:
        model = WorkerModel(artifact, options, target=self.name)
        model.load()
        return model


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    (tmp_path / "tiny.gguf").write_bytes(tiny())
    return Artifact.loose(tmp_path / "tiny.gguf")


@pytest.fixture
def model(clock: Path, artifact: Artifact) -> Iterator[WorkerModel]:
    with WorkerModel(artifact, LoadOptions(context=64), target="clock") as model:
        model.load()
        yield model


def text(model: Model, prompt: str, **options: Any) -> str:
    return Completion.of(model.generate(prompt, Sampling(**options))).text


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# -- the interface ---------------------------------------------------------------------------------


def test_the_promises_of_a_target_hold_through_a_worker(artifact: Artifact) -> None:
    check_target(InWorker("echo"), artifact)


def test_the_promises_hold_with_real_weights(smollm2: Artifact) -> None:
    check_target(InWorker("cpu"), smollm2)


def test_scores_are_the_same_numbers(smollm2: Artifact) -> None:
    options = LoadOptions(context=128, threads=1)
    with api.load_artifact(smollm2, options, target="cpu") as here:
        ids = here.tokenize("The quick brown fox jumps over the lazy dog. Then it sleeps.")
        expected = here.score(ids, distribution=True)
        info, template = here.info, here.template
    with InWorker("cpu").load(smollm2, options) as there:
        scores = there.score(ids, distribution=True)
        assert there.info == info
        assert there.template.source == template.source
        assert sorted(there.template.control_tokens) == sorted(template.control_tokens)
    assert scores.tokens == expected.tokens
    assert np.allclose(scores.logprobs, expected.logprobs, atol=1e-4)
    assert scores.distribution is not None and expected.distribution is not None
    assert scores.distribution.nbytes > 2 << 20  # it came in parts
    assert np.allclose(scores.distribution, expected.distribution, atol=1e-3)


def test_every_method(model: WorkerModel) -> None:
    assert (model.info.name, model.info.context, model.info.details["is"]) == ("tiny", 64, ["a", 1])
    assert model.tokenize("ab", bos=True, special=True) == [1, 97, 98, 2]
    assert model.detokenize([0xFF, 0x80], special=True) == b"\xff\x80!"
    assert model.embed(["abc", ""], pooling="mean").tolist() == [[3, 4], [0, 4]]
    assert model.rerank("a", ["bc"]) == [2.0]
    scores = model.score(np.array([1, 2, 3]))  # type: ignore[arg-type]  # NumPy's integers will do
    assert (scores.tokens, scores.logprobs.tolist(), scores.distribution) == ((1, 2, 3), [0, 257], None)
    whole = model.complete("ticks=2", logprobs=2)
    assert whole.text == "tick tick "
    assert whole.tokens == (0, 1)
    assert whole.usage.cached_tokens == 2
    assert whole.logprobs[1].text == b"t\xff"
    assert whole.logprobs[1].top == ((1, b"\xfe", -0.5), (2, b"", -9.0))
    assert model.chat_tokens([{"role": "user", "content": "a<x>b"}]) == [1, *b"a<", 2, *b"x>b", 2]
    assert model.metrics()["made_total"] == 2


def test_many_at_once(model: WorkerModel, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    streams = [model.generate(f"ticks={n} gate={gate} at=1") for n in range(1, 20)]
    for stream in streams:
        next(stream)  # all have begun
    assert model.tokenize("a") == [97]
    gate.touch()
    assert [Completion.of(stream).text for stream in streams] == ["tick " * n for n in range(1, 20)]


# -- errors ----------------------------------------------------------------------------------------


def test_errors_keep_their_class_and_words(model: WorkerModel) -> None:
    with pytest.raises(BadInput, match="too-loud"):
        text(model, "error=too-loud")
    with pytest.raises(EngineError, match="ZeroDivisionError: a bug"):
        text(model, "bug=1")
    assert text(model, "ticks=1") == "tick "


def test_errors_of_loading(clock: Path, artifact: Artifact) -> None:
    (clock / "error").write_text("the key is missing")
    with pytest.raises(EngineError, match="key is missing") as caught:
        InWorker("clock").load(artifact, LoadOptions())
    assert caught.value.hint == "Wind it up."
    (clock / "error").unlink()
    (clock / "full").write_text(str(os.getpid()))  # as long as this process lives
    with pytest.raises(DoesNotFit) as full:
        InWorker("clock").load(artifact, LoadOptions())
    assert (full.value.needed, full.value.available) == (2_000_000, 1_000_000)
    with pytest.raises(BadInput, match="unknown target"):
        InWorker("nobody").load(artifact, LoadOptions())
    wait_until(lambda: not psutil.Process().children())


def test_a_crash_of_loading(clock: Path, artifact: Artifact) -> None:
    (clock / "crash").write_text("always")
    with pytest.raises(EngineCrashed, match="SIGABRT: the spring broke"):
        InWorker("clock").load(artifact, LoadOptions())
    wait_until(lambda: not psutil.Process().children())


@pytest.mark.parametrize(
    ("order", "words"), [("kill=1", "SIGKILL .*memory ran out"), ("segv=1", "SIGSEGV: the hands fell off")]
)
def test_a_crash_reaches_everybody(clock: Path, artifact: Artifact, order: str, words: str) -> None:
    crashes: list[EngineCrashed] = []
    with WorkerModel(artifact, target="clock", on_crash=crashes.append) as model:
        model.load()
        other = model.generate(f"ticks=2 gate={clock / 'never'} at=1")
        assert next(other).text == ""
        stream = model.generate(f"ticks=5 pause=0.1 {order}")  # what was said before has come by then
        assert "tick " in [next(stream).text, next(stream).text]
        with pytest.raises(EngineCrashed, match=words):
            list(stream)
        with pytest.raises(EngineCrashed, match=words):
            list(other)
        with pytest.raises(EngineCrashed, match=words):
            model.tokenize("a")
        wait_until(lambda: len(crashes) == 1)
        assert not model.alive
    wait_until(lambda: gone(model.pid))


def test_closing_ends_what_runs(model: WorkerModel, clock: Path) -> None:
    stream = model.generate(f"ticks=2 gate={clock / 'never'} at=1")
    next(stream)
    model.close()
    with pytest.raises(EngineError, match="closed"):
        list(stream)
    with pytest.raises(EngineError, match="closed"):
        model.tokenize("a")
    model.close()
    assert gone(model.pid)
    assert (clock / f"closed-{model.pid}").exists()  # the engine was closed, not killed


# -- how far a generation goes -----------------------------------------------------------------------


def test_closing_the_stream_cancels(model: WorkerModel) -> None:
    stream = model.generate("ticks=1000000 pause=0.001")
    next(stream)
    stream.close()
    wait_until(lambda: model.metrics()["cancelled_total"] == 1)


def test_a_stream_that_nobody_began_is_no_request(model: WorkerModel) -> None:
    model.generate("ticks=1000000").close()
    assert text(model, "ticks=1") == "tick "
    assert model.metrics()["made_total"] == 1


def test_a_slow_reader_misses_nothing(model: WorkerModel) -> None:
    stream = model.generate("ticks=5000")
    next(stream)
    wait_until(lambda: model.metrics()["made_total"] == 5000)  # the model does not wait for it
    assert len([*stream]) >= 5000


def test_an_engine_that_breaks_its_promises_fails_only_its_request(model: WorkerModel) -> None:
    other = model.generate("ticks=100 pause=0.01")
    next(other)
    with pytest.raises(EngineError, match="without saying why"):
        list(model.generate("ticks=1 endless=1"))
    with pytest.raises(EngineError, match="cannot be told"):
        list(model.generate("ticks=1 odd=1"))
    assert sum(chunk.text == "tick " for chunk in other) >= 99


def test_a_request_that_cannot_be_told_is_forgotten(model: WorkerModel) -> None:
    with pytest.raises(TypeError):
        list(model.generate("ticks=1", Sampling(temperature=np.float32(0.5))))  # type: ignore[arg-type]
    assert not model._requests and not model._watched


def test_a_stream_can_be_pushed(model: WorkerModel) -> None:
    said: SimpleQueue[Chunk | Exception] = SimpleQueue()
    stream = model.generate("ticks=3")
    assert isinstance(stream, PushedChunks)
    stream.push(said.put)
    items = [said.get(timeout=LIMIT)]
    while not (isinstance(items[-1], Exception) or items[-1].finish_reason):
        items.append(said.get(timeout=LIMIT))
    assert "".join(item.text for item in items if isinstance(item, Chunk)) == "tick " * 3


# -- the process -----------------------------------------------------------------------------------


def test_it_outlives_the_thread_that_started_it(clock: Path, artifact: Artifact) -> None:
    made: list[Model] = []
    starter = threading.Thread(target=lambda: made.append(InWorker("clock").load(artifact, LoadOptions())))
    starter.start()
    starter.join()
    threading.Event().wait(0.2)  # the kernel's signal would have come by now
    assert text(made[0], "ticks=1") == "tick "
    made[0].close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_all_are_for_the_server(model: WorkerModel, number: signal.Signals) -> None:
    assert os.getsid(model.pid) != os.getsid(0)
    os.kill(model.pid, number)
    assert text(model, "ticks=3 pause=0.1") == "tick " * 3


PARENT = """
import sys
from alight.artifact import Artifact
from alight.pushed import PushedChunks
from alight.server.worker_model import WorkerModel
from pathlib import Path
from queue import SimpleQueue

model = WorkerModel(Artifact.loose(Path(sys.argv[1])), target="clock")
model.load()
stream = model.generate(sys.argv[2])
next(stream)
print(model.pid, flush=True)
input()
"""


@pytest.mark.parametrize(
    "busy", ["ticks=1000000000 pause=0.01", "ticks=2 gate=/nowhere at=0", "pause=0.2 hang=1"]
)
def test_it_dies_with_its_parent(clock: Path, artifact: Artifact, busy: str) -> None:
    if "hang" in busy and sys.platform != "linux":
        pytest.skip("only Linux ends a process whose threads are stuck")
    command = [sys.executable, "-c", PARENT, str(artifact.weights[0]), busy]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        worker = int(parent.stdout.readline())
        assert not gone(worker)
        parent.kill()
    wait_until(lambda: gone(worker))


def answers(model: Model) -> bool:
    try:
        return bool(model.metrics())
    except EngineError:
        return False


def test_a_worker_that_is_stuck_is_killed(
    clock: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alight.server.worker_model._GRACE", 0.5)
    model = InWorker("clock").load(artifact, LoadOptions())
    assert isinstance(model, WorkerModel)
    stream = model.generate("pause=0.2 hang=1")
    next(stream)
    wait_until(lambda: not answers(model))
    model.close()
    assert gone(model.pid)


def test_its_output_goes_to_the_log(
    clock: Path, artifact: Artifact, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="alight"):
        InWorker("clock").load(artifact, LoadOptions()).close()
    lines = [record.getMessage() for record in caplog.records]
    assert "tiny: the clock is wound up" in lines
    assert "tiny: tick-tock" in lines
    assert capfd.readouterr().out == ""


def test_a_bug_in_the_engine_is_logged_with_its_traceback(
    model: WorkerModel, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EngineError):
        text(model, "bug=1")
    (record,) = [r for r in caplog.records if "Traceback" in r.getMessage()]
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("tiny: a request failed")


def test_nothing_is_left_of_it(clock: Path, artifact: Artifact) -> None:
    process = psutil.Process()
    InWorker("clock").load(artifact, LoadOptions()).close()  # starts the thread that starts workers
    before = process.num_fds(), threading.active_count()
    for _ in range(5):
        with InWorker("clock").load(artifact, LoadOptions()) as model:
            next(model.generate("ticks=1000000"))
    assert not process.children()
    wait_until(lambda: (process.num_fds(), threading.active_count()) == before)


def test_no_module_of_the_working_directory_is_taken(
    clock: Path, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    InWorker("clock").load(artifact, LoadOptions()).close()
