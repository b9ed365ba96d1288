"""A client's JSON schema, checked and spelled as llguidance understands it. Changes no meaning."""

from __future__ import annotations

import json
from typing import Any

from moe_serve.grammars.refusal import RefusedError
from moe_serve.grammars.schema import numbers
from moe_serve.grammars.schema.finite import has_finite_instance
from moe_serve.grammars.schema.references import repair
from moe_serve.grammars.schema.walk import Path, Schema, depth, shown, subschemas

MAX_DEPTH = 120
"""llguidance's JSON parser ends at 128."""
MAX_PROPERTIES = 4000
"""Of one object. Compile time grows with their square; it is some 3 s at this number."""
MAX_ENUM = 100_000
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Those that llguidance follows; every other word is an annotation, as the standard has it."""


def parse(text: str) -> Any:
    """The schema of a text. RefusedError: it is no JSON."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise RefusedError(f"the schema is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise RefusedError(f"the schema is not valid JSON: {error}") from error


def checked(document: Any) -> Any:
    """The document, changed in place. RefusedError says what cannot be followed, and where."""
    if depth(document) > MAX_DEPTH:
        raise RefusedError(f"the schema is nested deeper than {MAX_DEPTH} levels")
    for path, schema in subschemas(document):
        _check_counts(schema, path)
        _drop_annotations(schema)
        if isinstance(ref := schema.get("$ref"), str):
            schema["$ref"] = repair(document, ref)
    numbers.check(document)
    if not has_finite_instance(document):
        raise RefusedError("no finite text fits the schema: a required part of it refers to itself without end")
    return document


def _check_counts(schema: Schema, path: Path) -> None:
    for keyword, most in (("properties", MAX_PROPERTIES), ("enum", MAX_ENUM)):
        value = schema.get(keyword)
        if isinstance(value, list | dict) and len(value) > most:
            raise RefusedError(f"{shown(path, keyword)} has {len(value)} entries; at most {most} are followed")


def _drop_annotations(schema: Schema) -> None:
    """What a generator wrote for readers refuses no schema."""
    if "format" in schema and (not isinstance(schema["format"], str) or schema["format"] not in FORMATS):
        del schema["format"]
    if "$schema" in schema and "json-schema.org" not in str(schema["$schema"]):
        del schema["$schema"]
