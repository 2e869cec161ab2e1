"""The conformance suite of a target, and the smallest target that passes it.

from alight.testing import check_target
check_target(MyTarget(), artifact)      # raises AssertionError naming the broken promise
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from alight.artifact import Artifact
from alight.chat import ChatTemplate
from alight.errors import AlightError, BadInput, ContextExceeded, EngineError
from alight.target import (
    Availability,
    Chunk,
    Completion,
    FinishReason,
    LoadOptions,
    Model,
    ModelInfo,
    Prompt,
    Sampling,
    Scores,
    Target,
    Usage,
    without_images,
)
from alight.text import TextStream

if TYPE_CHECKING:
    from alight.target import FloatArray

_END = 256
_ECHO_TEMPLATE = "{{ messages[-1]['content'] }}"


class EchoTarget(Target):
    """Says what it was told. Loads any artifact, needs no engine: for trying servers and clients."""

    name = "echo"
    formats = frozenset({"gguf", "onnx", "mlc", "safetensors"})
    automatic = False

    def probe(self) -> Availability:
        return Availability(True, "needs nothing")

    def load(self, artifact: Artifact, options: LoadOptions) -> Model:
        return EchoModel(artifact.name, options.context or 4096)


class EchoModel(Model):
    """A model whose answer is its prompt; a token is a byte, 256 is the end."""

    def __init__(self, name: str = "echo", context: int = 4096) -> None:
        self.info = ModelInfo(name, "echo", context, 257, 0, "echo", context)
        self.template = ChatTemplate(_ECHO_TEMPLATE)
        self._closed = threading.Event()

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk]:
        sampling = sampling or Sampling()
        tokens = self._placed(prompt)
        if not tokens:
            raise BadInput("the prompt is empty", hint="Give at least one token of text.")
        if len(tokens) >= self.info.context:
            raise ContextExceeded(len(tokens) + 1, self.info.context)
        return self._run(tokens, sampling, TextStream(sampling.stop))

    def _placed(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        return self._checked(without_images(prompt, self.info.name))

    def _run(self, tokens: list[int], sampling: Sampling, stream: TextStream) -> Generator[Chunk]:
        limit = len(tokens) + 1 if sampling.max_tokens is None else sampling.max_tokens
        limit = min(limit, self.info.context - len(tokens))
        made, reason = 0, "length"
        for token in [*tokens, _END][:limit]:
            made += 1
            if token == _END:
                reason = "stop"
                break
            text = stream.feed(bytes([token]))
            yield Chunk(text, (token,))
            if stream.stopped:
                reason = "stop"
                break
        finish: FinishReason = "stop" if reason == "stop" else "length"
        yield Chunk(stream.finish(), (), finish, Usage(len(tokens), made, 1e-6, 1e-6 * made))

    def score(self, tokens: Sequence[int], *, distribution: bool = False, top: int = 0) -> Scores:
        """Every token is as likely as any other."""
        import numpy as np

        ids = self._checked(tokens)
        if len(ids) < 2:
            raise BadInput(f"score got {len(ids)} tokens", hint="It needs at least two.")
        if len(ids) > self.info.context:
            raise ContextExceeded(len(ids), self.info.context)
        flat: FloatArray = np.full((len(ids) - 1, 257), -np.log(257), np.float32)
        likeliest = tuple((token, float(flat[0, 0])) for token in range(min(top, 257)))
        return Scores(
            tuple(ids),
            flat[:, 0],
            flat if distribution else None,
            (likeliest,) * (len(ids) - 1) if top else (),
        )

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        self._opened()
        return list(text.encode())

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        return bytes(t for t in self._checked(tokens) if t != _END)

    def close(self) -> None:
        self._closed.set()

    def _opened(self) -> None:
        if self._closed.is_set():
            raise EngineError(f"model {self.info.name!r} is closed", hint="Load it again.")

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        self._opened()
        if bad := [t for t in tokens if not 0 <= t <= _END]:
            raise BadInput(f"token {bad[0]} is outside the vocabulary of 257")
        return list(tokens)


def check_target(target: Target, artifact: Artifact, options: LoadOptions | None = None) -> None:
    """Check a target's promises on a real artifact.

    Args:
        artifact: a small model in a format that the target reads.

    Raises:
        AssertionError: naming the promise that is broken.
    """
    state = target.probe()
    _promise(state.here, f"probe() says it is here (it says: {state.reason}; {state.install})")
    _promise(artifact.format in target.formats, f"formats holds {artifact.format!r}")
    model = target.load(artifact, options or LoadOptions(context=512))
    try:
        _check_info(model)
        _check_tokens(model)
        _check_generate(model)
        _check_limits(model)
        _check_score(model)
        _check_threads(model)
    finally:
        model.close()
    model.close()
    _promise(
        _raises(EngineError, lambda: model.tokenize("x")),
        "a closed model raises EngineError, and closes twice",
    )


def _check_info(model: Model) -> None:
    info = model.info
    _promise(0 < info.context <= 512, "info.context is at most the context asked for")
    _promise(info.vocabulary > 1 and bool(info.target), "info is filled in")


def _check_tokens(model: Model) -> None:
    for text in (
        "hello world",
        "  two  spaces\n\ttab",
        "你好，世界",
        "émoji 👩‍🚀 ok",
        "x = {'a': [1, 2]}  # code",
    ):
        ids = model.tokenize(text)
        _promise(all(0 <= i < model.info.vocabulary for i in ids), "token ids are inside the vocabulary")
        back = model.detokenize(ids).decode()
        _promise(
            back.strip() == text.strip(), f"detokenize(tokenize({text!r})) gives the text back, not {back!r}"
        )
    _promise(model.tokenize("") == [], "an empty text has no tokens")


def _check_generate(model: Model) -> None:
    greedy = Sampling(max_tokens=12, temperature=0)
    chunks = list(model.generate("The capital of France is", greedy))
    last = chunks[-1]
    _promise(
        last.finish_reason in ("stop", "length") and last.usage is not None, "the last chunk ends the stream"
    )
    _promise(all(c.finish_reason is None for c in chunks[:-1]), "only the last chunk has a finish_reason")
    whole = Completion.of(chunks)
    _promise(whole.usage.completion_tokens <= 12, "max_tokens holds")
    again = Completion.of(model.generate("The capital of France is", greedy))
    _promise(whole.tokens == again.tokens, "greedy decoding repeats itself")
    seeded = Sampling(max_tokens=12, temperature=1, seed=7)
    first, second = (Completion.of(model.generate("Once upon a time", seeded)) for _ in range(2))
    _promise(first.text == second.text, "the same seed gives the same text")
    if len(whole.text) > 3:
        stop = whole.text[2:4]
        cut = Completion.of(
            model.generate("The capital of France is", Sampling(max_tokens=12, temperature=0, stop=(stop,)))
        )
        _promise(
            stop not in cut.text and cut.finish_reason == "stop",
            "a stop string ends the text and is not in it",
        )
        _promise(cut.text == whole.text[: whole.text.index(stop)], "nothing before the stop string is lost")
    stream = model.generate("Count: one, two,", Sampling(max_tokens=64, temperature=0))
    next(stream)
    stream.close()
    after = Completion.of(model.generate("The capital of France is", greedy))
    _promise(after.tokens == whole.tokens, "a cancelled stream leaves nothing behind")


def _check_limits(model: Model) -> None:
    long = (model.tokenize("word ") * model.info.context)[: model.info.context]
    _promise(
        _raises(ContextExceeded, lambda: list(model.generate(long))),
        "a prompt that fills the context is refused",
    )
    _promise(_raises(BadInput, lambda: list(model.generate([]))), "an empty prompt is refused")
    _promise(
        _raises(BadInput, lambda: list(model.generate([model.info.vocabulary]))),
        "foreign token ids are refused",
    )
    full = Completion.of(model.generate(long[:-4], Sampling(temperature=0)))
    _promise(full.usage.completion_tokens <= 4, "generation ends where the context does")
    none = Completion.of(model.generate("Hi", Sampling(max_tokens=0)))
    _promise(none.text == "" and none.finish_reason == "length", "max_tokens=0 generates nothing")


def _check_score(model: Model) -> None:
    import numpy as np

    ids = model.tokenize("The quick brown fox jumps over the lazy dog.")
    scores = model.score(ids, distribution=True)
    _promise(scores.logprobs.shape == (len(ids) - 1,), "score gives one log-probability per following token")
    rows = scores.distribution
    _promise(
        rows is not None and rows.shape == (len(ids) - 1, model.info.vocabulary), "distribution has its shape"
    )
    if rows is not None:
        _promise(bool(np.allclose(np.exp(rows).sum(axis=1), 1, atol=1e-3)), "distributions sum to one")
        picked = rows[np.arange(len(ids) - 1), ids[1:]]
        _promise(
            bool(np.allclose(picked, scores.logprobs, atol=1e-5)), "logprobs are entries of the distribution"
        )
    best = model.score(ids, top=3).top
    _promise(
        len(best) == len(ids) - 1 and all(len(one) == 3 for one in best), "top gives so many at each place"
    )
    if rows is not None:
        found = np.array([[logprob for _, logprob in one] for one in best])
        expected = np.sort(rows, axis=1)[:, :-4:-1]
        _promise(bool(np.allclose(found, expected, atol=1e-4)), "top are the likeliest, best first")
    _promise(_raises(BadInput, lambda: model.score(ids[:1])), "score refuses a single token")


def _check_threads(model: Model) -> None:
    prompts = ("One plus one is", "The sky is", "Water boils at", "Cats and")
    sampling = Sampling(max_tokens=8, temperature=0)

    def run(prompt: str) -> tuple[int, ...]:
        return Completion.of(model.generate(prompt, sampling)).tokens

    alone = [run(p) for p in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(run, prompts))
    for prompt, a, b in zip(prompts, alone, together, strict=True):
        _promise(a == b, f"{prompt!r} gets the same tokens alone and among others ({a} and {b})")


def _raises(kind: type[AlightError], call: Callable[[], object]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def _promise(kept: bool, promise: str) -> None:
    if not kept:
        raise AssertionError(f"broken promise: {promise}")
