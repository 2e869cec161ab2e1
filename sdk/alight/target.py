"""The contract between alight and a runtime: Target, Model, Sampling, Chunk.

A target is a runtime for one kind of device. It says whether it is here (`probe`), which artifact
formats it reads, and turns an artifact into a `Model`. A `Model` has the same interface whatever runs
it; `alight.testing.check_target` is the conformance suite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from alight.chat import ChatTemplate, Message
from alight.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from alight.artifact import Artifact

    FloatArray: TypeAlias = NDArray[np.float32]

FinishReason: TypeAlias = Literal["stop", "length"]
# A text; or token ids, among them images as the bytes of their files.
Prompt: TypeAlias = "str | Sequence[int | bytes]"
KV_TYPES = ("f16", "q8_0", "q4_0")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and what else of the engine a request uses.

    `temperature=0` is greedy and needs no seed. The names are llama.cpp's.
    """

    max_tokens: int | None = None  # None: until the model stops or the context is full
    temperature: float = 0.8
    top_k: int = 40  # 0: off
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1  # -1: whole context
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0  # 0: off
    xtc_threshold: float = 0.1
    mirostat: int = 0  # 1 or 2: replaces top_k, top_p, min_p and typical_p
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit); -inf forbids it
    seed: int | None = None  # None: another one each time
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # go on to max_tokens; for measurements
    logprobs: int | None = None  # None: none; N: of each chosen token and of the N likeliest at its place
    grammar: str = ""  # GBNF that the text must follow
    json_schema: str = ""  # JSON Schema (as JSON text) that the text must follow; "{}" is any object
    adapters: tuple[
        tuple[str, float], ...
    ] = ()  # LoRA adapters by the name they were loaded under, and scale
    keep_special: tuple[str, ...] = ()  # control tokens that are shown in the text, such as "<tool_call>"

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, want: str) -> None:
            if not ok:
                raise BadInput(f"{name} is {getattr(self, name)!r}", hint=f"It must be {want}.")

        need(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "0 or more")
        need(0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        need(self.top_k >= 0, "top_k", "0 (off) or more")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        need(0 < self.repeat_penalty <= 100, "repeat_penalty", "above 0 and at most 100 (1 is off)")
        need(abs(self.presence_penalty) <= 100, "presence_penalty", "between -100 and 100")
        need(abs(self.frequency_penalty) <= 100, "frequency_penalty", "between -100 and 100")
        need(self.repeat_last_n >= -1, "repeat_last_n", "-1 (whole context), 0 (off) or more")
        need(0 < self.typical_p <= 1, "typical_p", "above 0 and at most 1")
        need(0 <= self.dry_multiplier <= 100, "dry_multiplier", "between 0 (off) and 100")
        need(1 <= self.dry_base <= 100, "dry_base", "between 1 and 100")
        need(self.dry_allowed_length >= 0, "dry_allowed_length", "0 or more")
        need(self.dry_penalty_last_n >= -1, "dry_penalty_last_n", "-1 (whole context), 0 (off) or more")
        need(0 <= self.xtc_probability <= 1, "xtc_probability", "between 0 and 1")
        need(0 <= self.xtc_threshold <= 1, "xtc_threshold", "between 0 and 1")
        need(self.mirostat in (0, 1, 2), "mirostat", "0 (off), 1 or 2")
        need(0 < self.mirostat_tau <= 100, "mirostat_tau", "above 0 and at most 100")
        need(0 < self.mirostat_eta <= 1, "mirostat_eta", "above 0 and at most 1")
        need(all(b == b for _, b in self.logit_bias), "logit_bias", "pairs of a token id and a number")
        need(self.logprobs is None or 0 <= self.logprobs <= 100, "logprobs", "between 0 and 100")
        need(not (self.grammar and self.json_schema), "grammar", "empty where json_schema is given")
        need(all(self.stop), "stop", "strings that are not empty")

    @classmethod
    def of(cls, **options: Any) -> Sampling:
        """A Sampling from keyword options; an unknown one is an error that names the known ones."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise BadInput(f"unknown sampling option {name!r}", hint=f"Known: {', '.join(known)}.")
        stop = options.get("stop", ())
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ())
        return cls(**options)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        context: tokens that the KV cache holds: the longest single conversation, and what all concurrent
            ones share. None takes the trained length up to 4096, shrunk to what fits.
        slots: sequences decoded at once; more requests wait.
        threads: None takes the number of physical cores.
        shift: when a conversation fills the context, drop its oldest half and go on, instead of ending.
        lookup: speculative decoding by prompt lookup: draft this many tokens at most from the text so far; 0 is off.
        draft: a GGUF of a smaller model with the same vocabulary, for speculative decoding.
        adapters: LoRA adapters (GGUF) by the name that requests choose them by.
        projector: a GGUF of the vision projector, for models that see; by default the one that the artifact
            brings along, if it does.
        prompt_cache: a folder where the KV state of long prompts is kept across restarts; None keeps none.
    """

    context: int | None = None
    slots: int = 16
    threads: int | None = None
    kv_type: str = "f16"
    flash_attention: bool | None = None
    mmap: bool = True  # map the weights from the file: faster to load, and the system can drop pages
    shift: bool = False
    lookup: int = 0
    draft: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    projector: str | None = None
    prompt_cache: str | None = None

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 8:
            raise BadInput(f"context is {self.context}", hint="It must be 8 tokens or more.")
        if not 1 <= self.slots <= 128:
            raise BadInput(f"slots is {self.slots}", hint="It must be between 1 and 128.")
        if not 0 <= self.lookup <= 32:
            raise BadInput(f"lookup is {self.lookup}", hint="It must be between 0 (off) and 32 tokens.")
        if self.threads is not None and self.threads < 1:
            raise BadInput(f"threads is {self.threads}", hint="It must be 1 or more.")
        if self.kv_type not in KV_TYPES:
            raise BadInput(f"kv_type is {self.kv_type!r}", hint=f"It must be one of {', '.join(KV_TYPES)}.")


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer took. Times are wall-clock seconds."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    cached_tokens: int = 0  # of the prompt, found in the KV cache
    drafted_tokens: int = 0  # by speculative decoding
    accepted_tokens: int = 0  # of the drafted ones

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: the first token belongs to the prompt's time."""
        later = self.completion_tokens - 1
        return later / self.decode_seconds if later > 0 and self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One chosen token with its log-probability (natural log, before temperature and truncation), and the
    likeliest tokens at its place as (token, text, logprob), best first. `text` need not end on a character."""

    token: int
    text: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one has a `finish_reason` and the `usage`. A target may send empty ones
    while it reads a long prompt, so that closing the stream takes effect soon."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()  # of `tokens`, where they were asked for


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `str(completion)` is its text."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Completion:
        """Collect a stream of chunks."""
        text: list[str] = []
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        last = Chunk(finish_reason="stop", usage=Usage())
        for last in chunks:
            text.append(last.text)
            tokens.extend(last.tokens)
            logprobs.extend(last.logprobs)
        usage = last.usage or Usage()
        return cls("".join(text), tuple(tokens), last.finish_reason or "stop", usage, tuple(logprobs))


@dataclass(frozen=True, slots=True)
class Scores:
    """Teacher-forced log-probabilities (natural log) of a token sequence of length n.

    `logprobs[i]` is log p(tokens[i+1] | tokens[:i+1]), shape (n-1,). `distribution[i]` is the whole
    log-softmax at that place, shape (n-1, vocabulary), where it was asked for; `top[i]` are the likeliest
    tokens there as (token, logprob), best first.
    """

    tokens: tuple[int, ...]
    logprobs: FloatArray
    distribution: FloatArray | None = None
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is."""

    name: str
    architecture: str
    context: int  # tokens this instance holds
    vocabulary: int
    parameters: int
    target: str
    trained_context: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)  # what the target wants to tell, for people
    vision: bool = False  # prompts may hold images


class Model(ABC):
    """A loaded model. Thread-safe; close it or use it in a `with` block.

    A target implements `generate`, `score`, `tokenize`, `detokenize` and `close`, and sets `info` and
    `template`; the rest stands on those.
    """

    info: ModelInfo
    template: ChatTemplate

    @abstractmethod
    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Generator[Chunk]:
        """Continue a prompt, as a stream.

        A text prompt gets the model's own beginning-of-sequence token; a sequence of token ids is taken
        as it is. For a model that sees, images may stand among them: the bytes of PNG, JPEG, GIF or BMP
        files. Closing the iterator cancels. Concatenated `text` is always whole characters.

        Raises:
            ContextExceeded: the prompt does not fit.
            BadInput: the prompt is empty, or holds ids outside the vocabulary or an image that is damaged.
            Unsupported: it holds an image, and the model cannot see.
        """

    @abstractmethod
    def score(self, tokens: Sequence[int], *, distribution: bool = False, top: int = 0) -> Scores:
        """Log-probabilities of the given tokens, each from those before it (see Scores).

        Args:
            distribution: all of the vocabulary's, too. top: the likeliest tokens at each place, so many.

        Raises:
            BadInput: fewer than two tokens. ContextExceeded: more than the context holds.
        """

    @abstractmethod
    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text. `bos` adds the beginning token where the model wants one; `special` reads
        control tokens such as <|im_start|> in the text as such (never for text from outside)."""

    @abstractmethod
    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        """The bytes of the tokens; they need not end on a character. `special` shows control tokens."""

    @abstractmethod
    def close(self) -> None:
        """Free the model. Safe to call twice; any other call after it is an EngineError."""

    def embed(self, texts: Sequence[str], *, pooling: str = "") -> FloatArray:
        """Unit-length embeddings, shape (len(texts), width), where the target can.

        Args:
            pooling: "mean", "cls" or "last"; by default what the model was trained for, else mean.

        Raises:
            BadInput: an empty text. ContextExceeded: a text that does not fit.
        """
        raise Unsupported(f"target {self.info.target!r} does not embed", hint="Use the cpu target.")

    def rerank(self, query: str, documents: Sequence[str]) -> list[float]:
        """How well each document answers the query; higher is better. Without a trained ranking head it is
        the cosine of the embeddings."""
        vectors = self.embed([query, *documents])
        return [float(x) for x in vectors[1:] @ vectors[0]]

    def metrics(self) -> dict[str, float]:
        """Counters and gauges of this model, by Prometheus-style names; empty where the target keeps none."""
        return {}

    @property
    def alive(self) -> bool:
        """Whether it can still answer. False: only loading it again helps."""
        return True

    def progress(self) -> int | None:
        """A count that grows while the engine works on anything, so that others notice when it hangs. It must
        not wait for the engine. None where the target keeps none."""
        return None

    def complete(self, prompt: Prompt, **options: Any) -> Completion:
        """Continue a prompt and return the whole answer. Options are those of Sampling."""
        return Completion.of(self.generate(prompt, Sampling.of(**options)))

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> Generator[Chunk]: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Any
    ) -> Completion | Generator[Chunk]:
        """Answer a conversation, given as OpenAI-style messages (`{"role": …, "content": …}`).

        The model's own chat template turns it into a prompt. Text in the messages never becomes a control
        token. A model that sees takes images as parts of a message's content: `[{"type": "image",
        "data": …}, {"type": "text", "text": "What is this?"}]`, with the bytes of a PNG, JPEG, GIF or BMP
        file. Options are those of Sampling.
        """
        chunks = self.generate(self.chat_tokens(messages), Sampling.of(**options))
        return chunks if stream else Completion.of(chunks)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int | bytes]:
        """The token ids (and images) that `chat` feeds the model."""
        return self.prompt_tokens(self.template.render(messages))

    def prompt_tokens(self, pieces: Sequence[str | bytes]) -> list[int | bytes]:
        """The token ids (and images) of a rendered prompt (see `ChatTemplate.render`)."""
        bos = self.template.bos
        first, rest = (pieces[0], pieces[1:]) if isinstance(pieces[0], str) else ("", pieces)
        tokens: list[int | bytes] = []
        tokens += self.tokenize(first, bos=not (bos and first.startswith(bos)), special=True)
        for piece in rest:
            tokens += [piece] if isinstance(piece, bytes) else self.tokenize(piece, special=True)
        return tokens

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def without_images(prompt: Sequence[int | bytes], name: str) -> list[int]:
    """The tokens of a prompt for a model that cannot see.

    Raises:
        Unsupported: there is an image among them.
    """
    tokens = [item for item in prompt if not isinstance(item, bytes)]
    if len(tokens) < len(prompt):
        raise Unsupported(f"{name!r} cannot see images", hint="Send text only, or take another model.")
    return tokens


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a target is here; if not, why, and the exact command that would bring it."""

    here: bool
    reason: str
    install: str = ""


class Target(ABC):
    """A runtime for one kind of device, found by the entry point group `alight.targets`."""

    name: str
    formats: frozenset[str]
    automatic = True  # False: only used when asked for by name

    @abstractmethod
    def probe(self) -> Availability:
        """Is the runtime here? Cheap, and never raises."""

    @abstractmethod
    def load(self, artifact: Artifact, options: LoadOptions) -> Model:
        """Load an artifact.

        Raises:
            TargetUnavailable, InvalidModelFile, DoesNotFit, EngineError.
        """
