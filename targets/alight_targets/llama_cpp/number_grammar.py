"""Numbers between two bounds as GBNF: the digits, compared one by one.

0 to 255, for example, is [0-9] | [1-9] [0-9] | "1" [0-9] [0-9] | "2" ([0-4] [0-9] | "5" [0-5]).
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

MOST_DIGITS = 16  # before the point, where there is no bound
_FRACTION = 12  # digits after those that a bound decides


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound of a range; `strict` excludes the value itself."""

    value: Decimal
    strict: bool = False


def integers(least: int | None, most: int | None) -> str:
    """The integers from `least` to `most`, without leading zeros; empty where there are none."""
    parts = []
    if least is None or least < 0:
        up_to = None if least is None else -least
        if negative := _naturals(max(1, 1 if most is None else -most), up_to):
            parts.append(f'"-" ({negative})')
    natural = _naturals(max(0, least or 0), most) if most is None or most >= 0 else ""
    if natural:
        parts.append(natural)
    return " | ".join(parts)


def decimals(least: Bound | None, most: Bound | None) -> str:
    """The numbers between two bounds, written without exponent; empty where there are none."""
    zero = Bound(Decimal(0))
    parts = []
    if least is None or least.value < 0:
        near = _negated(most) if most and most.value <= 0 else zero
        if negative := _magnitudes(near, _negated(least) if least else None):
            parts.append(f'"-" ({negative})')
    start = least if least and least.value >= 0 else zero
    positive = _magnitudes(start, most) if most is None or most.value >= 0 else ""
    if positive:
        parts.append(positive)
    return " | ".join(parts)


def _negated(bound: Bound) -> Bound:
    return Bound(-bound.value, bound.strict)


# -- integers ----------------------------------------------------------------------------------------


def _naturals(least: int, most: int | None) -> str:
    if most is None:
        most = int("9" * max(MOST_DIGITS, len(str(least))))
    parts = []
    for length in range(len(str(least)), len(str(most)) + 1):
        smallest = 10 ** (length - 1) if length > 1 else 0
        low, high = max(least, smallest), min(most, 10**length - 1)
        if low <= high:
            parts.append(_same_length(str(low), str(high)))
    return " | ".join(parts)


def _same_length(low: str, high: str) -> str:
    """The strings of digits from `low` to `high`, which are as long."""
    if low == high:
        return f'"{low}"' if low else '""'
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    if first == last:
        return f'"{low[0]}" ({_same_length(low[1:], high[1:])})'
    parts = []
    if rest and low[1:] != "0" * rest:
        parts.append(f'"{first}" ({_same_length(low[1:], "9" * rest)})')
        first += 1
    tail = ""
    if rest and high[1:] != "9" * rest:
        tail = f'"{last}" ({_same_length("0" * rest, high[1:])})'
        last -= 1
    if first <= last:
        parts.append(_digit(first, last) + (f" [0-9]{{{rest}}}" if rest else ""))
    return " | ".join([*parts, tail] if tail else parts)


def _digit(first: int, last: int) -> str:
    return f"[{first}-{last}]"


# -- fractions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Digits:
    """A set of strings of digits after a point: `some` is those with at least one digit, as GBNF."""

    none: bool  # also no digits at all, so no point
    some: str

    def after(self, digit: str) -> str:
        """All of them behind a digit; empty where the set is."""
        if not self.some:
            return digit if self.none else ""
        return f"{digit} ({self.some}){'?' if self.none else ''}"


_NOTHING = _Digits(False, "")
_ANYTHING = _Digits(True, f"[0-9]{{1,{_FRACTION}}}")
_ZEROS = _Digits(True, f'"0"{{1,{_FRACTION}}}')
_ABOVE_ZERO = _Digits(False, f'"0"{{0,{_FRACTION}}} [1-9] [0-9]{{0,{_FRACTION}}}')


def _union(none: bool, *parts: str) -> _Digits:
    return _Digits(none, " | ".join(part for part in parts if part))


def _at_least(digits: str, strict: bool) -> _Digits:
    if not digits:
        return _ABOVE_ZERO if strict else _ANYTHING
    first = int(digits[0])
    above = _ANYTHING.after(_digit(first + 1, 9)) if first < 9 else ""
    return _union(False, _at_least(digits[1:], strict).after(f'"{first}"'), above)


def _at_most(digits: str, strict: bool) -> _Digits:
    if not digits:
        return _NOTHING if strict else _ZEROS
    first = int(digits[0])
    below = _ANYTHING.after(_digit(0, first - 1)) if first else ""
    return _union(True, below, _at_most(digits[1:], strict).after(f'"{first}"'))


def _between(low: str, high: str, low_strict: bool, high_strict: bool) -> _Digits:
    """From `low` to `high`, digits without trailing zeros."""
    if not high:  # so low is none, either: the value itself
        return _NOTHING if low_strict or high_strict else _ZEROS
    if not low and not low_strict:
        return _at_most(high, high_strict)
    first, last = int(low[0]) if low else 0, int(high[0])
    if first == last:
        return _union(False, _between(low[1:], high[1:], low_strict, high_strict).after(f'"{first}"'))
    return _union(
        False,
        _at_least(low[1:], low_strict).after(f'"{first}"'),
        _ANYTHING.after(_digit(first + 1, last - 1)) if first + 1 < last else "",
        _at_most(high[1:], high_strict).after(f'"{last}"'),
    )


def _magnitudes(low: Bound, high: Bound | None) -> str:
    """Numbers without sign."""
    whole, fraction = _split(low.value)
    if high is None:
        above = _naturals(whole + 1, None)
        return _joined((f'"{whole}"', _at_least(fraction, low.strict)), (f"({above})", _ANYTHING))
    if high.value < low.value:
        return ""
    top, top_fraction = _split(high.value)
    if whole == top:
        return _joined((f'"{whole}"', _between(fraction, top_fraction, low.strict, high.strict)))
    middle = _naturals(whole + 1, top - 1) if whole + 1 < top else ""
    return _joined(
        (f'"{whole}"', _at_least(fraction, low.strict)),
        (f"({middle})", _ANYTHING if middle else _NOTHING),
        (f'"{top}"', _at_most(top_fraction, high.strict)),
    )


def _joined(*parts: tuple[str, _Digits]) -> str:
    """Whole numbers with their fractions."""
    found = []
    for whole, digits in parts:
        point = f' ("." ({digits.some}))' + ("?" if digits.none else "") if digits.some else ""
        if digits.none or digits.some:
            found.append(whole + point)
    return " | ".join(found)


def _split(value: Decimal) -> tuple[int, str]:
    """1.50 as 1 and "5"."""
    whole, _, fraction = format(value, "f").partition(".")
    return int(whole), fraction.rstrip("0")
