"""A model that says what a test wrote for it, with any chat template; a token is a byte."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from alight.chat import ChatTemplate
from alight.target import Chunk, FinishReason, ModelInfo, Sampling, TokenLogprob, Usage
from alight.testing import EchoModel
from alight.text import TextStream


class ScriptedModel(EchoModel):
    """Gives the scripted answers one after the other, a character per chunk, and notes what it was asked.

    Attributes:
        prompts, samplings: of each `generate`, in order.
    """

    def __init__(self, template: str, *answers: str) -> None:
        super().__init__("scripted", context=100_000)
        self.info = ModelInfo("scripted", "echo", 100_000, 257, 0, "echo", 100_000)
        self.template = ChatTemplate(template, bos="<BOS>", eos="<EOS>")
        self.answers = list(answers)
        self.prompts: list[str] = []
        self.samplings: list[Sampling] = []

    def generate(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generator[Chunk]:
        sampling = sampling or Sampling()
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        self.prompts.append(bytes(tokens).decode())
        self.samplings.append(sampling)
        return self._say(self.answers.pop(0) if self.answers else "", len(tokens), sampling)

    def _say(self, answer: str, prompt: int, sampling: Sampling) -> Generator[Chunk]:
        stream = TextStream(sampling.stop)
        made, reason = 0, "stop"
        for char in answer:
            if sampling.max_tokens is not None and made >= sampling.max_tokens:
                reason = "length"
                break
            made += 1
            text = stream.feed(char.encode())
            yield Chunk(text, (ord(char) % 256,), logprobs=_logprobs(char, sampling))
            if stream.stopped:
                break
        ended: FinishReason = "length" if reason == "length" else "stop"
        yield Chunk(stream.finish(), (), ended, Usage(prompt, made, 0.5, 0.25, cached_tokens=1))


def _logprobs(char: str, sampling: Sampling) -> tuple[TokenLogprob, ...]:
    if sampling.logprobs is None:
        return ()
    data = char.encode()
    top = tuple((i, bytes([97 + i]), -1.0 - i) for i in range(sampling.logprobs))
    return (TokenLogprob(data[0], data, -0.5, top),)
