"""Speed and memory of a GGUF file or an exported folder, measured in a process of its own.

A fresh process shows what the model alone takes, and nothing that the build computed before (torch's threads, a
reference's distributions) disturbs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from alight import evaluate
from alight.api import load_artifact
from alight.artifact import Artifact
from alight.errors import AlightError, DoesNotFit, EngineError
from alight.evaluate import Speed
from alight.target import Completion, LoadOptions, Model, Sampling

_SMALL_CONTEXT = 1024
_DECODED = 64  # tokens of a single stream, at most
_TOKENS = 48  # of each of several streams


@dataclass(frozen=True, slots=True)
class Run:
    """What a process that loaded the file saw.

    Attributes:
        memory_bytes: resident with the whole context allocated; 0: that was not possible beside the build.
        stream_speed: decode of each of several streams, tokens/s; None where one was asked for.
    """

    speed: Speed
    load_seconds: float
    memory_bytes: int
    stream_speed: float | None


def measure(file: Path, *, context: int, streams: int) -> Run:
    """Load a file with a context for all streams and measure it.

    Raises:
        EngineError: the process failed, with its words.
    """
    command = [sys.executable, "-m", __name__, str(file), str(context), str(streams)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        words = done.stderr.strip().splitlines()
        why = words[-1] if words else f"it ended with code {done.returncode}"
        raise EngineError(f"measuring {file.name} failed: {why}") from None
    if "error" in told:
        raise EngineError(f"measuring {file.name} failed: {told['error']}", hint=told["hint"])
    return Run(**(told | {"speed": Speed(**told["speed"])}))


def main(file: str, context: str, streams: str) -> int:
    """The child process: the result, or the error, is the last line of its output."""
    try:
        result: dict[str, object] = asdict(_measure(file, int(context), int(streams)))
    except AlightError as error:
        result = {"error": error.message, "hint": error.hint}
    print(json.dumps(result))
    return 0


def _measure(file: str, context: int, streams: int) -> Run:
    wanted = context * streams
    artifact = Artifact.loose(Path(file))
    most = artifact.trained_context or wanted  # the engine refuses a longer one
    small = min(_SMALL_CONTEXT, most)
    started = time.perf_counter()
    try:
        fits = wanted <= most
        model = _load(artifact, wanted if fits else small)
    except DoesNotFit:
        fits = False
        model = _load(artifact, small)
    loaded = time.perf_counter() - started
    with model:
        speed = evaluate.speed(model, new_tokens=min(_DECODED, model.info.context // 2))
        memory = psutil.Process().memory_info().rss if fits else 0
        together = _together(model, streams) if streams > 1 else None
    return Run(speed, loaded, memory, together)


def _load(artifact: Artifact, context: int) -> Model:
    """Read into memory, since mapped pages would not all count."""
    return load_artifact(artifact, LoadOptions(context=context, mmap=False))


def _together(model: Model, streams: int) -> float:
    """Decode speed of each of `streams` answers that are written at once, tokens/s: the slowest one's."""
    speeds = [0.0] * streams

    def write(number: int) -> None:
        prompt = model.tokenize(f"{number + 1}. It was a bright day, and the boat went out to sea.", bos=True)
        sampling = Sampling(max_tokens=_TOKENS, temperature=0, ignore_eos=True)
        speeds[number] = Completion.of(model.generate(prompt, sampling)).usage.tokens_per_second

    threads = [threading.Thread(target=write, args=(i,)) for i in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(speeds)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
