"""JSON Schemas: what is none is refused, and the place is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alight.errors import BadInput
from alight.tools import check_schema

GOOD: list[Any] = [
    {},
    True,
    {"type": ["string", "null"], "minLength": 1, "maxLength": 1, "pattern": "^a$", "format": "date"},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {"items": [{"type": "string"}], "additionalItems": False},
    {"items": {"enum": [1, None, "x"]}, "prefixItems": [True], "minItems": 0, "uniqueItems": True},
    {"$defs": {"a/b": {"$ref": "#"}}, "$ref": "#/$defs/a~1b", "x-note": {"type": 5}},
    {"anyOf": [{"const": {"type": "anything"}}, {"$ref": "#/anyOf/0"}], "not": {"multipleOf": 0.5}},
    {"properties": {"type": {"type": "string"}, "enum": {"enum": ["a"]}}},
    {"minimum": -1.5, "maximum": 2, "exclusiveMinimum": True, "description": "x", "default": {"type": 1}},
]


@pytest.mark.parametrize("schema", GOOD, ids=lambda schema: str(schema)[:40])
def test_schemas(schema: Any) -> None:
    check_schema(schema, "schema")


BAD: list[tuple[Any, str]] = [
    (None, "schema is null"),
    ([], "schema is []"),
    ("x", 'schema is "x"'),
    ({"type": "strnig"}, "schema.type is \"strnig\"\nDid you mean 'string'?"),
    ({"type": []}, "schema.type"),
    ({"type": 5}, "schema.type is 5"),
    ({"properties": {"age": {"type": "int"}}}, "schema.properties.age.type"),
    ({"properties": [1]}, "schema.properties is [1]"),
    ({"properties": {"age": 5}}, "schema.properties.age is 5"),
    ({"items": {"items": {"items": 5}}}, "schema.items.items.items"),
    ({"items": [True, 5]}, "schema.items[1]"),
    ({"anyOf": []}, "schema.anyOf"),
    ({"anyOf": {}}, "schema.anyOf"),
    ({"oneOf": [True, {"enum": []}]}, "schema.oneOf[1].enum"),
    ({"required": "a"}, "schema.required"),
    ({"required": [1]}, "schema.required"),
    ({"minLength": -1}, "schema.minLength"),
    ({"minLength": 1.5}, "schema.minLength"),
    ({"maxItems": True}, "schema.maxItems"),
    ({"minItems": 3, "maxItems": 2}, "schema.minItems is 3, more than maxItems, 2"),
    ({"multipleOf": 0}, "schema.multipleOf"),
    ({"minimum": "0"}, "schema.minimum"),
    ({"pattern": 5}, "schema.pattern"),
    ({"$ref": "https://example.org/x"}, "schema.$ref"),
    ({"$ref": "#name"}, "schema.$ref"),
    ({"$ref": "#/$defs/none"}, "schema.$ref is '#/$defs/none', which the schema does not have"),
    ({"$ref": "#/required", "required": []}, "which is not a schema"),
    ({"not": 1, "x" * 100: 1}, "schema.not is 1"),
]


@pytest.mark.parametrize(("schema", "says"), BAD, ids=lambda value: str(value)[:40])
def test_bad_schemas_name_the_place(schema: Any, says: str) -> None:
    with pytest.raises(BadInput) as error:
        check_schema(schema, "schema")
    assert str(error.value).startswith(says) or says in str(error.value)


def test_a_schema_that_is_too_deep() -> None:
    schema: Any = {}
    for _ in range(500):
        schema = {"not": schema}
    with pytest.raises(BadInput, match="64 levels"):
        check_schema(schema, "schema")
    json.dumps(schema)  # Python itself could still take it
