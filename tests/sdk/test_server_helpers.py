"""A model that ticks like a clock, so that tests can watch when it is cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence

from alight.chat import ChatTemplate
from alight.pushed import Cancel, Deliver, PushedChunks
from alight.target import Chunk, Model, ModelInfo, Sampling, Scores, Usage

FOREVER = 10**9
LIMIT = 60.0  # seconds; generous, for busy machines: no test measures time


class TickModel(Model):
    """Says "tick " again and again.

    Args:
        ticks: how often.
        pause: seconds between two.
        text: what it says.
        gate: waits for it before the tick number `gate_at`.
        error, fail_at: raised instead of the tick of that number.
    """

    def __init__(
        self,
        *,
        ticks: int = FOREVER,
        pause: float = 0.002,
        text: str = "tick ",
        gate: threading.Event | None = None,
        gate_at: int = 0,
        error: Exception | None = None,
        fail_at: int = 0,
    ) -> None:
        self.info = ModelInfo("tick", "clock", 4096, 257, 1000, "test", 4096)
        self.template = ChatTemplate("{{ messages[-1]['content'] }}")
        self.ticks, self.pause, self.text = ticks, pause, text
        self.gate, self.gate_at = gate, gate_at
        self.error, self.fail_at = error, fail_at
        self.begun = 0
        self.made = 0
        self.cancelled = 0
        self.closed = False
        self.sampling: Sampling | None = None

    def generate(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generator[Chunk]:
        self.sampling = sampling
        self.begun += 1
        try:
            for number in range(self.ticks):
                if self.gate and number == self.gate_at:
                    assert self.gate.wait(LIMIT)
                if self.error and number == self.fail_at:
                    raise self.error
                self.made += 1
                yield Chunk(self.text, (number % 256,))
                time.sleep(self.pause)
            yield Chunk("", (), "stop", Usage(len(prompt), self.ticks, 0.001, 0.001))
        except GeneratorExit:
            self.cancelled += 1
            raise

    def score(self, tokens: Sequence[int], *, distribution: bool = False, top: int = 0) -> Scores:
        raise NotImplementedError

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        return list(text.encode())

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        return bytes(tokens)

    def close(self) -> None:
        self.closed = True


class PushedTicks(TickModel):
    """The same from an engine that has a thread of its own."""

    def generate(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generator[Chunk]:
        chunks = super().generate(prompt, sampling)
        wanted = threading.Event()
        wanted.set()

        def begin(deliver: Deliver) -> Cancel:
            def run() -> None:
                for chunk in chunks:
                    if not wanted.is_set():
                        chunks.close()
                        return
                    deliver(chunk)

            threading.Thread(target=run, daemon=True).start()
            return wanted.clear

        return PushedChunks(begin)


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for something that happens soon, or fail."""
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def answer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "alight-answer"]


def chat(content: str = "hello", **fields: object) -> dict[str, object]:
    """A request that both APIs understand."""
    return {"model": "tick", "messages": [{"role": "user", "content": content}], **fields}
