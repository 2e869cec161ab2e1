"""A target for worker processes that does what its prompts say: tick, wait, hang or die.

It is found like anybody's: by an entry point (see the fixture `clock` in conftest.py). A prompt is words
such as "ticks=3 pause=0.01 kill=2"; what happens while loading is told by files in $CLOCK_FOLDER.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from alight.artifact import Artifact
from alight.chat import ChatTemplate
from alight.errors import BadInput, DoesNotFit, EngineError
from alight.target import (
    Availability,
    Chunk,
    LoadOptions,
    Model,
    ModelInfo,
    Sampling,
    Scores,
    Target,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from alight.target import FloatArray


class ClockTarget(Target):
    name = "clock"
    formats = frozenset({"gguf"})
    automatic = False

    def probe(self) -> Availability:
        return Availability(True, "needs nothing")

    def load(self, artifact: Artifact, options: LoadOptions) -> Model:
        folder = Path(os.environ["CLOCK_FOLDER"])
        with (folder / "loads").open("a") as loads:
            print(artifact.name, os.getpid(), options.context, file=loads)
        print("the clock is wound up")  # an engine may print what it likes
        print("tick-tock", file=sys.stderr)
        while (folder / "wait").exists():
            time.sleep(0.01)
        if (folder / "crash").exists():
            if (folder / "crash").read_text() == "once":
                (folder / "crash").unlink()
            print("the spring broke", file=sys.stderr, flush=True)
            os.abort()
        if (folder / "error").exists():
            raise EngineError((folder / "error").read_text(), hint="Wind it up.")
        if (folder / "full").exists() and psutil.pid_exists(int((folder / "full").read_text())):
            raise DoesNotFit(artifact.name, 2_000_000, 1_000_000)
        if (folder / "most").exists() and (options.context or 0) > int((folder / "most").read_text()):
            raise DoesNotFit(artifact.name, 2_000_000, 1_000_000)
        return ClockModel(artifact, options)


class ClockModel(Model):
    def __init__(self, artifact: Artifact, options: LoadOptions) -> None:
        context = options.context or 4096
        self.info = ModelInfo(artifact.name, "clock", context, 257, 1000, "clock", details={"is": ["a", 1]})
        self.template = ChatTemplate(
            "{{ messages[-1]['content'] }}", bos="<s>", eos="</s>", control_tokens=["<s>", "</s>", "<x>"]
        )
        self._folder = Path(os.environ["CLOCK_FOLDER"])
        self._made = self._cancelled = 0
        self._alive = True

    @property
    def alive(self) -> bool:
        return self._alive

    def generate(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generator[Chunk]:
        text = prompt if isinstance(prompt, str) else bytes(prompt).decode().strip("\1\2")
        orders = dict(word.partition("=")[::2] for word in text.split() if "=" in word)
        ticks = int(orders.get("ticks", 3))
        if "error" in orders:
            raise BadInput(orders["error"])
        if "bug" in orders:
            raise ZeroDivisionError("a bug")
        try:
            for number in range(ticks):
                yield Chunk()  # as engines do while they read a long prompt
                self._obey(orders, number)
                self._made += 1
                logprobs = (TokenLogprob(number % 256, b"t\xff", -0.5, ((1, b"\xfe", -0.5), (2, b"", -9.0))),)
                yield Chunk(
                    "tick ", (number % 256,), logprobs=logprobs if sampling and sampling.logprobs else ()
                )
                time.sleep(float(orders.get("pause", 0)))
            if "endless" in orders:
                return
            if "odd" in orders:
                yield Chunk("odd", (np.int64(7),))  # type: ignore[arg-type]  # what JSON does not know
            yield Chunk("", (), "stop", Usage(len(prompt), ticks, 0.001, 0.01, 2, 4, 3))
        except GeneratorExit:
            self._cancelled += 1
            raise

    def _obey(self, orders: dict[str, str], number: int) -> None:
        if "gate" in orders and number == int(orders.get("at", 0)):
            while not Path(orders["gate"]).exists():
                time.sleep(0.005)
        if orders.get("once") and Path(orders["once"]).exists():
            return
        if orders.get("once"):
            Path(orders["once"]).touch()
        if orders.get("break") == str(number):
            self._alive = False
            raise EngineError("the clock is broken")
        if orders.get("kill") == str(number):
            os.kill(os.getpid(), signal.SIGKILL)
        if orders.get("segv") == str(number):
            print("the hands fell off", file=sys.stderr, flush=True)
            ctypes.string_at(0)
        if orders.get("hang") == str(number):
            ctypes.PyDLL(None).pause()  # native code that never gives the interpreter back

    def score(self, tokens: Sequence[int], *, distribution: bool = False, top: int = 0) -> Scores:
        rows = np.arange((len(tokens) - 1) * 257, dtype=np.float32).reshape(-1, 257)
        return Scores(tuple(tokens), rows[:, 0], rows if distribution else None)

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        return ([1] if bos else []) + list(text.encode()) + ([2] if special else [])

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        return bytes(tokens) + (b"!" if special else b"")

    def embed(self, texts: Sequence[str], *, pooling: str = "") -> FloatArray:
        return np.array([[len(text), len(pooling)] for text in texts], np.float32)

    def metrics(self) -> dict[str, float]:
        figures = {"made_total": self._made, "cancelled_total": self._cancelled, "kv_cells_used": 5}
        return {**figures, "threads": threading.active_count()}

    def progress(self) -> int | None:
        return self._made if (self._folder / "counts").exists() else None

    def close(self) -> None:
        if (self._folder / "loads").exists():
            (self._folder / f"closed-{os.getpid()}").touch()
