"""Is a JSON Schema one? Checked before an engine sees it, so that the message can name the place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from alight.errors import BadInput, nearest

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_DEEPEST = 64  # levels; grammars and templates recurse


def parse_schema(text: str, where: str) -> Any:
    """The JSON Schema in a text, checked.

    Raises:
        BadInput: it is no JSON, or no schema.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not JSON: {error}") from None
    check_schema(schema, where)
    return schema


def check_schema(schema: Any, where: str) -> None:
    """Check a JSON Schema (draft 2020-12 and the older ones that are in use).

    Args:
        where: the field that holds it, put before the path in messages.

    Raises:
        BadInput: naming the place, such as `format.properties.age.type`.
    """
    _Check(schema).schema(schema, where, 0)


class _Check:
    def __init__(self, root: Any) -> None:
        self._root = root

    def schema(self, schema: Any, where: str, depth: int) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, Mapping):
            _refuse(where, schema, "a JSON Schema: an object, true or false")
        if depth > _DEEPEST:
            raise BadInput(f"{where} is nested more than {_DEEPEST} levels deep")
        for key, value in schema.items():
            here = f"{where}.{key}"
            if key in _ONE:
                self.schema(value, here, depth + 1)
            elif key in NAMED:
                if not isinstance(value, Mapping):
                    _refuse(here, value, "an object of schemas")
                for name, one in value.items():
                    self.schema(one, f"{here}.{name}", depth + 1)
            elif key in _SEVERAL or (key == "items" and isinstance(value, list)):
                if not isinstance(value, list) or (not value and key != "items"):
                    _refuse(here, value, "a list of at least one schema")
                for i, one in enumerate(value):
                    self.schema(one, f"{here}[{i}]", depth + 1)
            elif key == "items":
                self.schema(value, here, depth + 1)
            elif key == "type":
                _check_type(value, here)
            elif key == "$ref":
                self._reference(value, here)
            elif key in _PLAIN:
                fits, want = _PLAIN[key]
                if not fits(value):
                    _refuse(here, value, want)
        for least, most in _RANGES:
            if least in schema and most in schema and schema[least] > schema[most]:
                raise BadInput(f"{where}.{least} is {schema[least]}, more than {most}, {schema[most]}")

    def _reference(self, value: Any, where: str) -> None:
        if not isinstance(value, str):
            _refuse(where, value, "text")
        if value != "#" and not value.startswith("#/"):
            hint = "Only references to a place inside the schema (#/…) can be followed."
            raise BadInput(f"{where} is {value!r}", hint=hint)
        found = self._root
        for part in value[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                raise BadInput(f"{where} is {value!r}, which the schema does not have")
        if not isinstance(found, (Mapping, bool)):
            raise BadInput(f"{where} is {value!r}, which is not a schema")


def _check_type(value: Any, where: str) -> None:
    names = value if isinstance(value, list) else [value]
    if not names:
        _refuse(where, value, "a type, or a list of at least one")
    for name in names:
        if not isinstance(name, str) or name not in TYPES:
            near = nearest(name, TYPES, count=1) if isinstance(name, str) else []
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise BadInput(
                f"{where} is {_short(value)}", hint=f"{hint}The types are {', '.join(map(repr, TYPES))}."
            )


def _refuse(where: str, value: Any, want: str) -> None:
    raise BadInput(f"{where} is {_short(value)}", hint=f"It must be {want}.")


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else text[:59] + "…"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


# Keywords that hold one schema, a list of them, and schemas by name. What is in none of these tables means
# nothing to us: JSON Schema lets anyone add keywords.
_ONE = frozenset(
    {
        "additionalItems",
        "additionalProperties",
        "contains",
        "contentSchema",
        "else",
        "if",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
_SEVERAL = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
NAMED = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
_COUNT = (_is_count, "a whole number, 0 or more")
_NUMBER = (_is_number, "a number")
_TEXT = (_is_text, "text")
_PLAIN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of at least one value"),
    "required": (_are_names, "a list of property names"),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    # Before draft 6, true or false: whether `minimum` itself is meant.
    "exclusiveMinimum": (lambda value: _is_number(value) or isinstance(value, bool), "a number"),
    "exclusiveMaximum": (lambda value: _is_number(value) or isinstance(value, bool), "a number"),
    "minLength": _COUNT,
    "maxLength": _COUNT,
    "minItems": _COUNT,
    "maxItems": _COUNT,
    "minProperties": _COUNT,
    "maxProperties": _COUNT,
    "minContains": _COUNT,
    "maxContains": _COUNT,
    "uniqueItems": (lambda value: isinstance(value, bool), "true or false"),
    "pattern": _TEXT,
    "format": _TEXT,
    "title": _TEXT,
    "description": _TEXT,
}
_RANGES = (
    ("minimum", "maximum"),
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
)
