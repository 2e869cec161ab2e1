"""Text that must follow a JSON Schema or a grammar: which tokens may come next, by llguidance.

https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alight.errors import BadInput, EngineError, MissingExtra
from alight.target import Sampling
from alight.tools.schema import parse_schema
from alight_targets.common.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# As the cpu target's grammars have it: one space at most, or a model might go on with them for ever; and oneOf
# holds where any of its schemas does.
_JSON: JsonCompileOptions = {"whitespace_pattern": " ?", "coerce_one_of": True}


class Guide:
    """Follows the text of one request, token by token.

    Args:
        vocabulary: tokens that the matcher knows; logits may have more columns.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def finished(self) -> bool:
        """Can nothing more come?"""
        return self._matcher.is_stopped()

    def allows(self, token: int) -> bool:
        return token < self._vocabulary and self._matcher.validate_tokens([token]) == 1

    def mask(self, vocabulary: int) -> NDArray[np.bool_]:
        """Which tokens may come next, shape (vocabulary,)."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.zeros(vocabulary, np.bool_)
        known = np.unpackbits(bits, bitorder="little")[:vocabulary]
        allowed[: len(known)] = known
        return allowed

    def accept(self, token: int) -> None:
        """Note that the token was said.

        Raises:
            EngineError: the matcher met a limit of its own, such as a grammar that became too large.
        """
        if not self._matcher.consume_token(token):
            raise EngineError(f"the grammar cannot be followed further: {self._matcher.get_error()}")


class Guides:
    """Makes the guides of one model's requests. Thread-safe.

    Args:
        extra: of alight that brings llguidance, for the message where it is missing.
    """

    def __init__(self, tokenizer: Tokenizer, extra: str) -> None:
        self._source = tokenizer
        self._extra = extra
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = (
            None  # made for the first request that needs it: it takes a second
        )

    def guide(self, sampling: Sampling) -> Guide | None:
        """The guide of a request; None if its text may be anything.

        Raises:
            BadInput: the schema or grammar is none, or has something that cannot be followed; names it.
        """
        if not (sampling.json_schema or sampling.grammar):
            return None
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise MissingExtra("text by a schema or grammar", self._extra) from error
        what, grammar = _grammar(sampling)
        tokens = self._tokens()
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise BadInput(f"{what} cannot be followed: {_first_line(matcher.get_error())}")
        return Guide(matcher, tokens.vocab_size)

    def _tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                ends = sorted(self._source.ends)
                self._tokenizer = LLTokenizer(self._source.source, eos_token=ends or None)
            return self._tokenizer


def _grammar(sampling: Sampling) -> tuple[str, str]:
    """The name of the option, and the grammar in llguidance's own form."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    if sampling.json_schema:
        schema = parse_schema(sampling.json_schema, "json_schema")
        if isinstance(schema, bool):
            raise BadInput(
                f"json_schema is {sampling.json_schema}", hint='Give an object, such as {"type": …}.'
            )
        schema = schema or {"type": "object"}
        return "json_schema", LLMatcher.grammar_from_json_schema(schema, overrides=_JSON)
    try:
        return "grammar", LLMatcher.grammar_from_lark(gbnf_to_lark(sampling.grammar))
    except GbnfToLarkError as error:
        raise BadInput(
            f"the grammar is not valid GBNF: {error}", hint="Its start rule is named root."
        ) from error


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"
