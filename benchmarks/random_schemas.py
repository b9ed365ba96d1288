"""Random JSON schemas of bounded size: every value they allow fits into a few hundred tokens.

Covers what OpenAI's structured outputs and function parameters use: objects with required and optional
properties, nested arrays and objects, strings (length, pattern, format, enum), numbers with bounds,
booleans, null, const, anyOf, $defs and $ref.
"""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
WORDS = ("name", "age", "city", "is_old", "tags", "größe", "x y", "id", "价格", 'a"b', "notes", "kind", "parent")
PATTERNS = ("[a-z]{2,6}", "[A-Z][0-9]{3}", "(red|green|blue)", "[0-9]{4}-[0-9]{2}")
FORMATS = ("date", "uuid", "ipv4")
"""Not date-time: its fraction of a second may have any number of digits."""


def random_schema(rng: random.Random) -> Schema:
    """An object schema at the top, as OpenAI's API wants it; one in ten is another type."""
    defs = {f"d{i}": _scalar(rng) for i in range(rng.randrange(3))}
    schema = _object(rng, 2, list(defs)) if rng.random() < 0.9 else _any(rng, 2, list(defs))
    return schema | {"$defs": defs} if defs else schema


def _any(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    if refs and rng.random() < 0.15:
        return {"$ref": f"#/$defs/{rng.choice(refs)}"}
    if depth == 0 or rng.random() < 0.5:
        return _scalar(rng)
    return rng.choice((_object, _array, _union))(rng, depth, refs)


def _object(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    names = rng.sample(WORDS, rng.randrange(5))
    properties = {name: _any(rng, depth - 1, refs) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    low = rng.randrange(3)
    return {"type": "array", "items": _any(rng, depth - 1, refs), "minItems": low, "maxItems": low + rng.randrange(3)}


def _union(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    return {"anyOf": [_any(rng, depth - 1, refs) for _ in range(rng.randrange(2, 4))]}


def _scalar(rng: random.Random) -> Schema:
    return rng.choice((_string, _string, _integer, _number, _constant))(rng)


def _string(rng: random.Random) -> Schema:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "enum": rng.sample(WORDS, rng.randrange(1, 4))}
    if kind == 1:
        return {"type": "string", "pattern": f"^{rng.choice(PATTERNS)}$"}
    if kind == 2:
        return {"type": "string", "format": rng.choice(FORMATS)}
    low = rng.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(12)}


def _integer(rng: random.Random) -> Schema:
    low = rng.randrange(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1000)}


def _number(rng: random.Random) -> Schema:
    """Bounded, and written with at most two digits after the point: numbers may be of any length otherwise."""
    low = rng.randrange(-100, 100)
    return {"type": "number", "minimum": low, "maximum": low + rng.randrange(1, 50), "multipleOf": 0.25}


def _constant(rng: random.Random) -> Schema:
    return rng.choice(({"type": "boolean"}, {"type": "null"}, {"const": rng.choice(WORDS)}, {"enum": [1, "a", None]}))
