"""Regular expressions as GBNF, for the text inside a JSON string. Python's own parser reads them."""

from __future__ import annotations

import re
import re._constants as sre  # type: ignore[import-not-found,unused-ignore]
import re._parser as parser  # type: ignore[import-not-found,unused-ignore]
from collections.abc import Sequence
from typing import Any

CHAR = r'([^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))'
_PLAIN = r'[^"\\\x7F\x00-\x1F]'  # a character that stands for itself
_CLASSES = {"CATEGORY_DIGIT": "0-9", "CATEGORY_SPACE": r"\x20", "CATEGORY_WORD": "a-zA-Z0-9_"}
_ESCAPED = (*range(0x20), 0x22, 0x5C, 0x7F)
_MOST = 1000  # of a repetition; llama.cpp's parser writes out each


def pattern(text: str) -> str:
    """What a string holds that a pattern is found in.

    Raises:
        ValueError: it is no regular expression, or has parts that no grammar can follow.
    """
    try:
        parts = list(parser.parse(text))
    except (re.error, RecursionError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    return _branch(parts, True, True)


def _branch(parts: Sequence[Any], starts: bool, ends: bool) -> str:
    """One alternative. Anything may stand before it if it `starts` the pattern, and after it if it `ends` it;
    but `^` and `$` say that nothing does."""
    if starts and parts and parts[0] == (sre.AT, sre.AT_BEGINNING):
        return _branch(parts[1:], False, ends)
    if ends and parts and parts[-1] == (sre.AT, sre.AT_END):
        return _branch(parts[:-1], starts, False)
    if len(parts) == 1 and parts[0][0] is sre.BRANCH:
        return " | ".join(_branch([*one], starts, ends) for one in parts[0][1][1])
    around = [f"{CHAR}*" if open_ else "" for open_ in (starts, ends)]
    return " ".join(filter(None, [around[0], *map(_part, parts), around[1]])) or '""'


def _part(part: Any) -> str:
    kind, value = part
    if kind is sre.LITERAL:
        return _literal(chr(value))
    if kind is sre.ANY:
        return _PLAIN
    if kind in (sre.IN, sre.NOT_LITERAL):
        return _set(value if kind is sre.IN else [(sre.NEGATE, None), (sre.LITERAL, value)])
    if kind is sre.BRANCH:
        return f"({_branch([part], False, False)})"
    if kind is sre.SUBPATTERN:
        _, add, remove, inside = value
        if not add and not remove:
            return f"({_branch([*inside], False, False)})"
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        least, most, inside = value
        if least > _MOST or (most is not sre.MAXREPEAT and most > _MOST):
            raise ValueError(f"it repeats something more than {_MOST} times")
        times = "" if most is sre.MAXREPEAT else most
        return f"({_branch([*inside], False, False)}){{{least},{times}}}"
    raise ValueError(f"a grammar cannot follow its {str(kind).lower()}")


def _literal(char: str) -> str:
    """A character as JSON has it in a string, as a GBNF literal."""
    short = {'"': r"\\\"", "\\": r"\\\\", "\n": r"\\n", "\r": r"\\r", "\t": r"\\t"}
    if char in short:
        return f'"{short[char]}"'
    return f'"\\\\u{ord(char):04x}"' if char < " " or char == "\x7f" else f'"{char}"'


def _set(items: Sequence[Any]) -> str:
    """A class of characters, without those that JSON would have to escape."""
    negated, inside = False, ""
    for kind, value in items:
        if kind is sre.NEGATE:
            negated = True
        elif kind is sre.LITERAL:
            inside += _code(value)
        elif kind is sre.RANGE:
            inside += f"{_code(value[0])}-{_code(value[1])}"
        elif kind is sre.CATEGORY and str(value) in _CLASSES:
            inside += _CLASSES[str(value)]
        else:
            raise ValueError(f"a grammar cannot follow its {str(value).lower()}")
    if negated:
        return f'[^{inside}"\\\\\\x7F\\x00-\\x1F]'
    if any(_holds(item, char) for item in items for char in _ESCAPED):
        raise ValueError("a class in it has characters that JSON escapes")
    return f"[{inside}]"


def _holds(item: Any, char: int) -> bool:
    kind, value = item
    return bool(value[0] <= char <= value[1] if kind is sre.RANGE else kind is sre.LITERAL and value == char)


def _code(number: int) -> str:
    if chr(number).isascii() and chr(number).isalnum():
        return chr(number)
    if number < 0x100:
        return f"\\x{number:02X}"
    return f"\\u{number:04X}" if number < 0x10000 else f"\\U{number:08X}"
