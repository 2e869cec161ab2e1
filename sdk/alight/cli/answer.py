"""Print an answer while it comes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

from alight.target import Chunk, Completion, Usage

# Control characters steer a terminal: a model that was made to print them could rewrite what you see.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def print_answer(chunks: Iterable[Chunk]) -> Completion:
    """Print the pieces as they come, end the line, and give the whole answer.

    Ctrl-C ends the line, too, and goes on to the caller.
    """
    terminal = sys.stdout.isatty()

    def printed() -> Iterator[Chunk]:
        for chunk in chunks:
            sys.stdout.write(_harmless(chunk.text) if terminal else chunk.text)
            sys.stdout.flush()
            yield chunk

    try:
        return Completion.of(printed())
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


def _harmless(text: str) -> str:
    return _STEERING.sub("\N{REPLACEMENT CHARACTER}", text)


def usage_line(usage: Usage) -> str:
    """ "12 tokens read in 0.1 s, 40 written at 21.3 tokens/s"."""
    read = f"{usage.prompt_tokens} tokens read in {usage.prompt_seconds:.1f} s"
    return f"{read}, {usage.completion_tokens} written at {usage.tokens_per_second:.1f} tokens/s"
