"""The grammar that a request's text must follow."""

from __future__ import annotations

import json
from functools import lru_cache

from alight.errors import BadInput
from alight.target import Sampling
from alight.tools import check_schema
from alight_targets.llama_cpp.schema_grammar import schema_grammar


def gbnf_of(sampling: Sampling) -> str:
    """The grammar that a request's text must follow; empty if it may be anything.

    Raises:
        BadInput: the JSON Schema is none, or has something that a grammar cannot follow; names the place.
    """
    return _from_schema(sampling.json_schema) if sampling.json_schema else sampling.grammar


@lru_cache(maxsize=64)
def _from_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"json_schema is not JSON: {error}") from None
    check_schema(schema, "json_schema")
    try:
        return schema_grammar({"type": "object"} if schema == {} else schema, "json_schema")
    except RecursionError:
        raise BadInput("json_schema is made of itself without end", hint="Look at its $ref.") from None
