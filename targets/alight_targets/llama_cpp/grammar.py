"""JSON Schema to GBNF, by the converter that llama-cpp-python carries."""

from __future__ import annotations

import json
from functools import lru_cache

from alight.errors import BadInput
from alight.target import Sampling

_ANY_CHARACTER, _JSON_CHARACTER = r'[^"\\]', r'[^"\\\x7F\x00-\x1F]'


def gbnf_of(sampling: Sampling) -> str:
    """The grammar that a request's text must follow; empty if it may be anything."""
    return _from_schema(sampling.json_schema) if sampling.json_schema else sampling.grammar


@lru_cache(maxsize=64)
def _from_schema(schema: str) -> str:
    from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

    try:
        parsed = json.loads(schema)
    except ValueError as error:
        raise BadInput(f"json_schema is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BadInput(f"json_schema is {type(parsed).__name__}", hint="It must be an object.")
    if not parsed:
        return str(JSON_GBNF)
    try:
        # The converter lets raw line breaks and other control characters into strings, which is not JSON.
        return str(json_schema_to_gbnf(schema)).replace(_ANY_CHARACTER, _JSON_CHARACTER)
    except Exception as error:  # the converter raises whatever its code meets
        raise BadInput(f"json_schema cannot be followed: {error!r}", hint="Simplify the schema.") from error
