"""JSON Schema as a grammar: what it lets through is what the schema accepts."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import llama_cpp as C
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model

import alight
from alight.errors import BadInput
from alight.target import Completion, Model, Sampling
from alight_targets.llama_cpp.grammar import gbnf_of
from alight_targets.llama_cpp.native import NativeModel
from alight_targets.llama_cpp.sampler import _CANDIDATE, _array

END = 257
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    file = tiny_model(tmp_path_factory.mktemp("grammar") / "tiny.gguf")
    with alight.load(file, threads=1, context=512) as model:
        yield model


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeModel]:
    native = NativeModel([tiny_model(tmp_path_factory.mktemp("grammar") / "tiny.gguf")])
    yield native
    native.close()


class Grammar:
    """llama.cpp's own reading of a schema's grammar."""

    def __init__(self, vocabulary: NativeModel, schema: Any) -> None:
        self._vocabulary = vocabulary
        self._gbnf = gbnf_of(Sampling(json_schema=json.dumps(schema)))

    def accepts(self, text: str) -> bool:
        grammar = C.llama_sampler_init_grammar(self._vocabulary.vocab, self._gbnf.encode(), b"root")
        assert grammar, self._gbnf
        try:
            for token in [*text.encode(), END]:
                one = np.array([(token, 1.0, 0.0)], _CANDIDATE)
                C.llama_sampler_apply(grammar, ctypes.byref(_array(one)))
                if not np.isfinite(one["logit"][0]):
                    return False
                if token != END:
                    C.llama_sampler_accept(grammar, token)
            return True
        finally:
            C.llama_sampler_free(grammar)


# -- numbers -----------------------------------------------------------------------------------------


def bounds_hold(value: Decimal, schema: dict[str, Any]) -> bool:
    def number(key: str) -> Decimal:
        return Decimal(repr(schema[key]))

    return (
        ("minimum" not in schema or value >= number("minimum"))
        and ("maximum" not in schema or value <= number("maximum"))
        and ("exclusiveMinimum" not in schema or value > number("exclusiveMinimum"))
        and ("exclusiveMaximum" not in schema or value < number("exclusiveMaximum"))
    )


def ranges(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    lower = st.sampled_from(["minimum", "exclusiveMinimum"])
    upper = st.sampled_from(["maximum", "exclusiveMaximum"])
    two = st.tuples(numbers, numbers).map(sorted)
    both = st.builds(lambda keys, ends: dict(zip(keys, ends, strict=True)), st.tuples(lower, upper), two)
    one = st.builds(lambda key, end: {key: end}, st.one_of(lower, upper), numbers)
    return st.one_of(both, one)


@FEW
@given(ranges(st.integers(-1200, 1200)), st.lists(st.integers(-1300, 1300), min_size=20, max_size=40))
def test_integers(vocabulary: NativeModel, schema: dict[str, Any], tries: list[int]) -> None:
    near = [end + step for end in schema.values() for step in (-1, 0, 1)]
    try:
        grammar = Grammar(vocabulary, {"type": "integer", **schema})
    except BadInput as error:
        assert "without any number" in str(error)
        assert not any(bounds_hold(Decimal(n), schema) for n in range(-1300, 1300))
        return
    for number in {*near, *tries, 0}:
        assert grammar.accepts(str(number)) == bounds_hold(Decimal(number), schema), (number, schema)
    for text in ("01", "-0", "+1", "1.0", "", "--1", "1e2"):
        assert not grammar.accepts(text)


@pytest.mark.parametrize("ends", [(0, 255), (-5, 5), (100, 100), (7, 1000), (-130, -2), (0, 0), (99, 101)])
def test_every_integer_of_a_range(vocabulary: NativeModel, ends: tuple[int, int]) -> None:
    grammar = Grammar(vocabulary, {"type": "integer", "minimum": ends[0], "maximum": ends[1]})
    accepted = [n for n in range(-200, 1100) if grammar.accepts(str(n))]
    assert accepted == [*range(ends[0], ends[1] + 1)]


HUNDREDTHS = st.integers(-250, 250).map(lambda n: n / 100)


@FEW
@given(ranges(HUNDREDTHS), st.lists(st.decimals("-3", "3", places=3), min_size=20, max_size=40))
def test_decimals(vocabulary: NativeModel, schema: dict[str, Any], tries: list[Decimal]) -> None:
    near = [Decimal(repr(end)) + step * Decimal("0.01") for end in schema.values() for step in (-1, 0, 1)]
    texts = {f"{value}" for value in (*near, *tries)} | {"0", "0.0", "1", "-1", "1.50", "2.5000"}
    try:
        grammar = Grammar(vocabulary, {"type": "number", **schema})
    except BadInput as error:
        assert "without any number" in str(error)
        assert not any(bounds_hold(Decimal(text), schema) for text in texts)
        return
    for text in texts:
        value = Decimal(text)
        if text.startswith("-") and not value:
            continue  # -0.000 may be written or not
        assert grammar.accepts(f"{value:f}") == bounds_hold(value, schema), (text, schema)
    for text in ("01.5", "1.", ".5", "1e9"):
        assert not grammar.accepts(text)


# -- other schemas -------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
}
TREE = {
    "$defs": {"value": {"type": "object", "properties": {"next": {"$ref": "#/$defs/value"}}}},
    "$ref": "#/$defs/value",
}

CASES: list[tuple[Any, list[str], list[str]]] = [
    (True, ["1", '{"a": [null]}', '"x"'], ["", "{", "nil"]),
    ({}, ["{}", '{"a": 1}'], ["1", "[]"]),
    ({"type": "array", "items": True, "maxItems": 2}, ["[]", "[1]", '[1, "a"]'], ["[1,2,3]", "[1,]"]),
    (PERSON, ['{"name": "Ann"}', '{"name":"","age":7}'], ["{}", '{"age": 7}', '{"name": "Ann", "age": -1}',
      '{"name": "Rumpel"}', '{"name": "A", "x": 1}']),
    ({"type": ["integer", "null"], "minimum": 3}, ["3", "null"], ["2", '"3"']),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}], "maxLength": 1, "maximum": 5},
     ['"a"', "5"], ['"ab"', "6"]),
    ({"anyOf": [{"type": "null"}, False]}, ["null"], ["1"]),
    ({"allOf": [{"type": "integer", "minimum": 2}, {"minimum": 1, "maximum": 4}]}, ["2", "4"], ["1", "5"]),
    ({"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {}}}]},
     ['{"a": 1}', '{"a": 1, "b": "x"}'], ["{}", '{"a": "1"}']),
    ({"enum": ["a\\b", 'say "hi"', 1, None, "é\n"]},
     [r'"a\\b"', r'"say \"hi\""', "1", "null", r'"é\n"'], ['"a"', "2"]),
    ({"const": {"a": [1]}}, ['{"a": [1]}'], ["{}"]),
    ({"enum": [1, "x", True], "type": "integer"}, ["1"], ['"x"', "true"]),
    (TREE, ["{}", '{"next": {"next": {}}}'], ['{"next": 1}', "[]"]),
    ({"$defs": {"a b": {"type": "null"}}, "items": {"$ref": "#/$defs/a b"}}, ["[null]", "[]"], ["[1]"]),
    ({"prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 1},
     ["[1]", '[1, "a"]'], ["[]", '["a"]', '[1, "a", 2]']),
    ({"prefixItems": [{"type": "integer"}], "items": {"type": "null"}, "maxItems": 3},
     ["[]", "[1]", "[1, null, null]"], ["[null]", "[1, null, null, null]"]),
    ({"items": [{"type": "integer"}], "additionalItems": False}, ["[]", "[1]"], ["[1, 2]"]),
    ({"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 3},
     ["[null, null]", "[null,null,null]"], ["[null]", "[]", "[null,null,null,null]"]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, ["{}", '{"a": 1, "b": 2}'], ['{"a": "x"}']),
    ({"properties": {"age": {"type": "null"}, "ago": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
     ["{}", '{"age": null}', '{"ag": 1}', '{"ages": 1, "x": 2}', '{"age": null, "b": 1}', '{"": 5}'],
     ['{"age": 1}', '{"ago": 1}', r'{"\u0061ge": 1}', '{"b": null}']),
    ({"type": "object", "required": ["z"]}, ['{"z": 1}', '{"z": 1, "a": 2}'], ["{}", '{"a": 1}']),
    ({"properties": {"a": True, "b": False, "c": True}}, ['{"a": 1, "c": 2}', '{"c": 1}', "{}"], ['{"b": 1}']),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"abc"', r'"a\n"'], ['"a"', '"abcd"']),
    ({"type": "string", "pattern": "^[a-f]{2}(-[0-9]+)?$"}, ['"ab"', '"cd-12"'], ['"abc"', '"ab-"', '"gh"']),
    ({"type": "string", "pattern": "b+"}, ['"abc"', '"b"'], ['"ac"', '""']),
    ({"type": "string", "pattern": r"^\d{3}\.\w$"}, ['"123.x"'], ['"123x"', '"12.x"']),
    ({"type": "string", "pattern": '^"[^x]"$|^y'}, [r'"\"a\""', '"yes"'], [r'"\"x\""', '"no"']),
    ({"type": "string", "format": "date"}, ['"2024-02-28"', '"1999-12-31"'], ['"2024-02-30"', '"2024-13-01"']),
    ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"123"']),
    ({"type": "string", "format": "email"}, ['"a note only"'], ["1"]),
    ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, ["1"], ["0"]),
    ({"type": "integer", "multipleOf": 1}, ["7"], ["7.5"]),
    ({"type": "boolean", "uniqueItems": False, "description": "x"}, ["true"], ["1"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), CASES, ids=lambda value: str(value)[:40])
def test_schemas(vocabulary: NativeModel, schema: Any, good: list[str], bad: list[str]) -> None:
    grammar = Grammar(vocabulary, schema)
    assert [text for text in good if not grammar.accepts(text)] == []
    assert [text for text in bad if grammar.accepts(text)] == []


REFUSED: list[tuple[Any, str]] = [
    (False, "json_schema is false"),
    ({"properties": {"a": False}, "required": ["a"]}, "json_schema.properties.a is false"),
    ({"properties": {"a": {"multipleOf": 5}}}, "json_schema.properties.a.multipleOf"),
    ({"not": {"type": "string"}}, "json_schema.not"),
    ({"anyOf": [{"type": "string"}, {"if": {}, "then": False}]}, "json_schema[1].if"),
    ({"items": {"type": "array", "uniqueItems": True}}, "json_schema.items.uniqueItems"),
    ({"patternProperties": {"^a": {}}}, "json_schema.patternProperties"),
    ({"minProperties": 1}, "json_schema.minProperties"),
    ({"type": "integer", "minimum": 0.1, "maximum": 0.9}, "without any number"),
    ({"type": "string", "pattern": "(?=a)b"}, "json_schema.pattern"),
    ({"type": "string", "pattern": r"(a)\1"}, "json_schema.pattern"),
    ({"type": "string", "pattern": "["}, "no regular expression"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "json_schema.pattern"),
    ({"prefixItems": [True], "items": False, "minItems": 2}, "at least 2 and at most 1"),
    ({"enum": ["a"], "type": "integer"}, "json_schema.enum"),
    ({"allOf": [{"const": 1}, {"const": 2}]}, "json_schema.const"),
    ({"$ref": "#", "type": "object"}, "made of itself"),
    ({"type": "objekt"}, "json_schema.type"),
]


@pytest.mark.parametrize(("schema", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_grammar_cannot_follow_is_refused_by_name(schema: Any, says: str) -> None:
    with pytest.raises(BadInput, match=re.escape(says)):
        gbnf_of(Sampling(json_schema=json.dumps(schema)))


# -- through the engine --------------------------------------------------------------------------------


WHOLE = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": -12, "exclusiveMaximum": 130},
        "x": {"type": "number", "exclusiveMinimum": 0.25, "maximum": 2.5},
        "who": {"type": "string", "maxLength": 4},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "maybe": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "required": ["n", "x", "tags"],
}


@pytest.mark.parametrize("seed", range(25))
def test_a_model_without_any_sense_keeps_to_it(model: Model, seed: int) -> None:
    ascii_only = tuple((byte, float("-inf")) for byte in range(128, 256))  # its bytes need not be UTF-8
    options = {"max_tokens": 200, "temperature": 2.0, "min_p": 0, "top_p": 1, "logit_bias": ascii_only}
    sampling = Sampling.of(seed=seed, json_schema=json.dumps(WHOLE), **options)
    answer = Completion.of(model.generate([seed], sampling))
    assert answer.finish_reason == "stop"
    said = json.loads(answer.text, parse_float=Decimal)
    assert {"n", "x", "tags"} <= said.keys() <= WHOLE["properties"].keys()  # type: ignore[attr-defined]
    assert type(said["n"]) is int and -12 <= said["n"] < 130
    assert Decimal("0.25") < said["x"] <= Decimal("2.5")
    assert len(said.get("who", "")) <= 4
    assert len(said["tags"]) <= 3 and {*said["tags"]} <= {"a", "b"}
    assert said.get("maybe") in (True, False, None)
