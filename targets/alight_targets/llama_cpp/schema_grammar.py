"""JSON Schema to GBNF: every text of the grammar is JSON that the schema accepts.

Not every JSON that it accepts is a text of the grammar: properties come in the schema's order, and where no
type is given, the one that its keywords are about is meant. What a grammar cannot follow is refused by name.
(llama-cpp-python carries a converter, too; that one ignores bounds of numbers, siblings of anyOf and types
in lists, and reads names of definitions as its own rules.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from math import ceil, floor
from typing import Any, NoReturn

from alight.errors import BadInput
from alight_targets.llama_cpp.number_grammar import Bound, decimals, integers
from alight_targets.llama_cpp.pattern_grammar import CHAR, pattern

_SPACE = '" "?'  # one space at most: a model might go on with them for ever
_RULES = {
    "space": _SPACE,
    "char": CHAR,
    "string": r'"\"" char* "\"" space',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15}) space',
    "number": '"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})? space',
    "boolean": '("true" | "false") space',
    "null": '"null" space',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" space (string ":" space value ("," space string ":" space value)*)? "}" space',
    "array": '"[" space (value ("," space value)*)? "]" space',
}
_YEAR_MONTH_DAY = '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8])'
_TIME = (
    '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? '
    '("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
)
_DATE = (  # days 29 to 31 where every year has them
    f'({_YEAR_MONTH_DAY} | [0-9]{{4}} "-" (("0" [13-9] | "1" [0-2]) "-" ("29" | "30") | '
    '("0" [13578] | "1" [02]) "-31"))'
)
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": '[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
}  # other formats are notes, as the standard has it

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ABOUT = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}
_RULING = {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}.union(*_ABOUT.values())
# Keywords that would refuse some texts, with the values that refuse none.
_CANNOT: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "multipleOf": (),
    "if": (),
    "contains": (),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "maxProperties": (),
    "minProperties": (0,),
    "patternProperties": ({},),
    "propertyNames": ({}, True, {"type": "string"}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
}


def schema_grammar(schema: Any, where: str) -> str:
    """The GBNF of a schema that `alight.tools.check_schema` accepts.

    Raises:
        BadInput: naming the place of what a grammar cannot follow.
    """
    return _Writer(schema).write(where)


class _Writer:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._rules: dict[str, str] = {}
        self._references: dict[str, str] = {}  # rule by what "$ref" says

    def write(self, where: str) -> str:
        if self._root is False:
            _refuse(where, "false, which no text fulfils")
        whole = self._visit({} if self._root is True else self._root, where)
        rules = {"root": whole, **_RULES, **self._rules}
        return "\n".join(f"{name} ::= {body}" for name, body in rules.items())

    def _rule(self, body: str, hint: str) -> str:
        """A rule of its own for a body; its name."""
        plain = re.sub(r"[^a-zA-Z0-9]+", "-", hint).strip("-")[-40:] or "x"
        name = f"{plain}-{len(self._rules)}"
        self._rules[name] = body
        return name

    def _value(self, schema: Any, where: str) -> str:
        """What stands for a part of the schema inside of others."""
        body = self._visit(schema, where)
        return body if re.fullmatch(r"[\w-]+", body) else self._rule(body, where)

    def _visit(self, schema: Any, where: str) -> str:
        if isinstance(schema, bool) or not isinstance(schema, Mapping):
            if schema is False:
                _refuse(where, "false, which no text fulfils")
            return "value"
        for key, neutral in _CANNOT.items():
            if key in schema and not any(schema[key] is n or schema[key] == n for n in neutral):
                if key == "multipleOf" and schema[key] == 1 and schema.get("type") == "integer":
                    continue
                _refuse(f"{where}.{key}", "here, which a grammar cannot follow", "Leave it out.")
        rest = {key: value for key, value in schema.items() if key in _RULING}
        if "$ref" in rest:
            return self._reference(rest.pop("$ref"), rest, where)
        if "allOf" in rest:
            parts = [self._resolved(part) for part in rest.pop("allOf")]
            return self._visit(_merged([rest, *parts], where), where)
        for key in ("anyOf", "oneOf"):
            if key in rest:
                options = rest.pop(key)
                return self._any(
                    [_merged([rest, self._resolved(o) if rest else o], where) for o in options], where
                )
        if "const" in rest:
            rest["enum"] = [rest.pop("const")]
        if "enum" in rest:
            return self._enumeration(rest, where)
        kind = rest.get("type")
        if isinstance(kind, list):
            return self._any([{**rest, "type": one} for one in kind], where)
        kind = kind or next((name for name, keys in _ABOUT.items() if keys & {*rest}), "")
        match kind:
            case "object" if _ABOUT["object"] & {*rest}:
                return self._object(rest, where)
            case "array" if _ABOUT["array"] & {*rest}:
                return self._array(rest, where)
            case "string" if _ABOUT["string"] & {*rest}:
                return self._string(rest, where)
            case "number" | "integer" if _ABOUT["number"] & {*rest}:
                return self._number(rest, kind == "integer", where)
            case _:
                return kind or "value"

    # -- several schemas as one ------------------------------------------------------------------

    def _any(self, options: Sequence[Any], where: str) -> str:
        found = [self._value(o, f"{where}[{i}]") for i, o in enumerate(options) if o is not False]
        if not found:
            _refuse(where, "false in all of its alternatives")
        return " | ".join(dict.fromkeys(found))

    def _reference(self, target: str, rest: dict[str, Any], where: str) -> str:
        if rest:
            return self._visit(_merged([rest, self._found(target)], where), where)
        if target not in self._references:
            name = self._references[target] = self._rule("", target)  # known before, for those that recur
            self._rules[name] = self._visit(self._found(target), target)
        return self._references[target]

    def _resolved(self, schema: Any) -> Any:
        """A schema that may be a reference, as what it refers to."""
        seen: set[str] = set()
        while isinstance(schema, Mapping) and "$ref" in schema and schema["$ref"] not in seen:
            seen.add(schema["$ref"])
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            schema = _merged([rest, self._found(schema["$ref"])], schema["$ref"])
        return schema

    def _found(self, reference: str) -> Any:
        found = self._root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found[int(name)] if isinstance(found, list) else found[name]
        return found

    # -- types -----------------------------------------------------------------------------------

    def _enumeration(self, schema: Mapping[str, Any], where: str) -> str:
        kinds = schema.get("type", _TYPES)
        kinds = [kinds] if isinstance(kinds, str) else kinds
        values = [v for v in schema["enum"] if any(_is_a(v, kind) for kind in kinds)]
        if not values:
            _refuse(f"{where}.enum", "without a value of its type")
        if others := {*schema} - {"type", "enum"}:
            _refuse(f"{where}.{min(others)}", "beside an enum", "Leave it out: the values say it all.")
        texts = (json.dumps(value, ensure_ascii=False) for value in values)
        return "(" + " | ".join(map(_literal, texts)) + ") space"

    def _number(self, schema: Mapping[str, Any], whole: bool, where: str) -> str:
        least = _bound(schema, "minimum", "exclusiveMinimum", max)
        most = _bound(schema, "maximum", "exclusiveMaximum", min)
        if whole:
            low = high = None
            if least:
                low = ceil(least.value) + (least.strict and least.value == ceil(least.value))
            if most:
                high = floor(most.value) - (most.strict and most.value == floor(most.value))
            body = integers(low, high)
        else:
            body = decimals(least, most)
        if not body:
            _refuse(where, "a range without any number")
        return f"({body}) space"

    def _string(self, schema: Mapping[str, Any], where: str) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        form = _FORMATS.get(schema.get("format", ""))
        if "pattern" in schema:
            if least or most != "" or form:
                _refuse(f"{where}.pattern", "beside a length or format", "Say it all in the pattern.")
            try:
                form = pattern(schema["pattern"])
            except ValueError as error:
                _refuse(f"{where}.pattern", json.dumps(schema["pattern"]), f"But {error}.")
        elif form and (least or most != ""):
            _refuse(f"{where}.format", "beside a length", "Leave one of them out.")
        return rf'"\"" ({form or f"char{{{least},{most}}}"}) "\"" space'

    def _array(self, schema: Mapping[str, Any], where: str) -> str:
        prefix, items = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(items, list):  # before draft 2020-12
            prefix, items = items, schema.get("additionalItems", True)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if items is False:
            most = len(prefix) if most is None else min(most, len(prefix))
        if most is not None and least > most:
            _refuse(where, f"an array of at least {least} and at most {most} values")
        parts = [self._value(part, f"{where}.prefixItems[{i}]") for i, part in enumerate(prefix[:most])]
        body = ""
        if most is None or most > len(parts):
            item = self._value(items, f"{where}.items")
            first, low = ("", least - len(parts)) if parts else (f"{item} ", least - 1)
            high = "" if most is None else most - len(parts) - (not parts)
            body = f'{first}("," space {item}){{{max(low, 0)},{high}}}'
            if not parts and least == 0:
                body = f"({body})?"
        for i, part in reversed([*enumerate(parts)]):
            comma = '"," space ' if i else ""
            body = f"{comma}{part} {body}"
            body = body if i < least else f"({body})?"
        return f'"[" space {body} "]" space'

    def _object(self, schema: Mapping[str, Any], where: str) -> str:
        properties = dict(schema.get("properties", {}))
        required = {*schema.get("required", ())}
        others = schema.get("additionalProperties", not properties)
        for name in sorted(required - {*properties}):
            if others is False and "additionalProperties" in schema:
                _refuse(f"{where}.required", f"about {name!r}, which is no property")
            properties[name] = True if others is False else others
        pairs = []
        for name, value in properties.items():
            if value is False and name not in required:
                continue
            key = _literal(json.dumps(name, ensure_ascii=False))
            body = self._value(value, f"{where}.properties.{name}")
            pairs.append((self._rule(f'{key} space ":" space {body}', f"{where}-{name}"), name in required))
        head = tail = ""  # what may follow, before and after the first pair
        if others is not False:
            key = self._other_key([*properties], where)
            body = self._value(others, f"{where}.additionalProperties")
            other = self._rule(f'{key} space ":" space {body}', f"{where}-other")
            head, tail = f'({other} ("," space {other})*)?', f'("," space {other})*'
        for rule, needed in reversed(pairs):
            begun = f"{rule} {self._rule(tail, where)}" if tail else rule
            head = begun if needed else f"{begun} | {self._rule(head, where)}" if head else f"({begun})?"
            tail = (f'"," space {rule}' if needed else f'("," space {rule})?') + (
                f" {self._rule(tail, where)}" if tail else ""
            )
        return f'"{{" space ({head}) "}}" space' if head else '"{" space "}" space'

    def _other_key(self, names: Sequence[str], where: str) -> str:
        """A key that is none of `names`: it parts from each at some character."""
        if not names:
            return "string"
        texts = [json.dumps(name, ensure_ascii=False)[1:-1] for name in names]
        return rf'"\"" {self._apart(texts, where)} "\""'

    def _apart(self, texts: Sequence[str], where: str) -> str:
        following: dict[str, list[str]] = {}
        for text in texts:
            if text:
                following.setdefault(text[0], []).append(text[1:])
        codes = "".join(_code(char) for char in following)
        parts = [rf'[^"\\\x7F\x00-\x1F{codes}] char*']
        parts += [f"{_literal(char)} {self._apart(rest, where)}" for char, rest in following.items()]
        if "" not in texts:
            parts.append('""')
        return self._rule(" | ".join(parts), where)


# -- schemas -----------------------------------------------------------------------------------------


def _merged(schemas: Sequence[Any], where: str) -> Any:
    """One schema that accepts what all of them accept."""
    merged: dict[str, Any] = {}
    for schema in schemas:
        if schema is False:
            return False
        for key, value in ({} if schema is True else schema).items():
            if key not in merged or merged[key] == value:
                merged[key] = value
            elif key in ("minimum", "exclusiveMinimum", "minLength", "minItems"):
                merged[key] = max(merged[key], value)
            elif key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems"):
                merged[key] = min(merged[key], value)
            elif key == "required":
                merged[key] = [*dict.fromkeys([*merged[key], *value])]
            elif key == "properties":
                both = {
                    name: {"allOf": [merged[key][name], value[name]]} for name in merged[key] if name in value
                }
                merged[key] = {**merged[key], **value, **both}
            elif key == "type" and (common := _common_types(merged[key], value)):
                merged[key] = common
            elif key in _RULING or key in _CANNOT:
                _refuse(
                    f"{where}.{key}", "there more than once, with other values", "Write them as one schema."
                )
    return merged


def _common_types(one: Any, other: Any) -> list[str]:
    """The types that two schemas have in common; an integer is a number, too."""
    wide = [{*([t] if isinstance(t, str) else t)} for t in (one, other)]
    wide = [types | ({"integer"} if "number" in types else set()) for types in wide]
    common = wide[0] & wide[1]
    return sorted(common - {"integer"} if "number" in common else common)


def _bound(schema: Mapping[str, Any], plain: str, exclusive: str, tighter: Any) -> Bound | None:
    """The tighter one of two bounds; a strict one where they are the same number."""
    found = [Bound(Decimal(repr(schema[plain])))] if plain in schema else []
    strict = schema.get(exclusive)
    if strict is True and found:  # before draft 6
        return Bound(found[0].value, True)
    if strict is not None and not isinstance(strict, bool):
        found.append(Bound(Decimal(repr(strict)), True))
    if not found:
        return None
    value = tighter(bound.value for bound in found)
    return Bound(value, any(bound.strict for bound in found if bound.value == value))


def _is_a(value: Any, kind: str) -> bool:
    kinds: dict[str, tuple[type, ...]] = {
        "object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "integer": (int,),
        "boolean": (bool,), "null": (type(None),),
    }  # fmt: skip
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, kinds[kind]) or (
        kind == "integer" and isinstance(value, float) and value.is_integer()
    )


def _refuse(where: str, what: str, hint: str = "") -> NoReturn:
    raise BadInput(f"{where} is {what}", hint=hint)


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _code(char: str) -> str:
    return char if char.isascii() and char.isalnum() else f"\\U{ord(char):08X}"
