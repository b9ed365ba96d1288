"""Numbers in a schema. llguidance reads bounds as 64-bit floats and integers as 64 bits, and rounds without a word.

Here a bound that it would round becomes the next number inwards that it keeps, so that no answer lies outside; a
number for which there is none is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from moe_serve.grammars.refusal import RefusedError
from moe_serve.grammars.schema.walk import Path, Schema, shown, subschemas

Number = int | float

LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
INT64 = range(-(2**63), 2**63)
EXACT = 2**53
"""Integers up to here are 64-bit floats too."""
LOWEST_INT = -(2**63) + 1024
"""Next to -2**63, for which llguidance makes no expression."""
LARGEST, SMALLEST = 9e18, 1e-60
"""Of floats for which llguidance makes expressions."""
MIN_SIZES = ("minLength", "minItems", "minProperties")
MAX_SIZES = ("maxLength", "maxItems", "maxProperties")
MAX_MIN_SIZE = 1_000_000
"""No answer is longer."""
MAX_SIZE = 2**31
MAX_MULTIPLE = 20_000
"""llguidance builds an automaton with one state for each remainder: 20,000 take about half a second."""


def check(root: Any) -> None:
    """Replace bounds that would be rounded, everywhere in a document; RefusedError names what cannot be kept."""
    multiple = 1
    has_integers = any(_may_be_integer(schema) for _, schema in subschemas(root))
    for path, schema in subschemas(root):
        _check_sizes(schema, path)
        _check_bounds(schema, path)
        _check_data(schema, path, has_integers)
        multiple = math.lcm(multiple, _multiple_of(schema, path))
        if multiple > MAX_MULTIPLE:
            where = shown(path, "multipleOf")
            raise RefusedError(f"{where}: the least common multiple of all multipleOf must not exceed {MAX_MULTIPLE}")


def _number(value: Any) -> Number | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _check_sizes(schema: Schema, path: Path) -> None:
    for key in MIN_SIZES:
        if (size := _number(schema.get(key))) is not None and size > MAX_MIN_SIZE:
            raise RefusedError(f"{shown(path, key)}: {size} is more than any answer has; at most {MAX_MIN_SIZE}")
    for key in MAX_SIZES:
        if (size := _number(schema.get(key))) is not None and size > MAX_SIZE:
            del schema[key]  # no answer comes near it


def _check_bounds(schema: Schema, path: Path) -> None:
    is_integer = _is_integer(schema.get("type"))
    for key in (*LOWER, *UPPER):
        value = _number(schema.get(key))
        if value is None:
            continue
        if not _is_finite(value):
            raise RefusedError(f"{shown(path, key)}: {value} is no number of JSON")
        kept = _integer_bound(value, key in LOWER) if is_integer else _float_bound(value, key in LOWER)
        if kept is None:
            raise RefusedError(f"{shown(path, key)}: {value} does not fit into 64 bits, and cannot be followed")
        if kept != value and key.startswith("exclusive"):  # further in than the bound: it may itself be reached
            del schema[key]
            key = key.removeprefix("exclusive").lower()
            kept = _tighter(kept, _number(schema.get(key)), key in LOWER)
        schema[key] = kept
    _require_room(schema, path)


def _tighter(kept: Number, other: Number | None, is_lower: bool) -> Number:
    if other is None:
        return kept
    return max(kept, other) if is_lower else min(kept, other)


def _require_room(schema: Schema, path: Path) -> None:
    low, high = (_number(schema.get(key)) for key in ("minimum", "maximum"))
    if low is not None and high is not None and low > high:
        raise RefusedError(f"{shown(path, 'minimum')}: no number that can be kept lies between minimum and maximum")


def _is_integer(kind: Any) -> bool:
    kinds = kind if isinstance(kind, list) else [kind]
    return "integer" in kinds and "number" not in kinds


def _is_finite(value: Number) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def _integer_bound(value: Number, is_lower: bool) -> Number | None:
    """The bound that llguidance keeps, at `value` or next to it inwards; None: there is none."""
    if abs(value) <= EXACT:
        return value
    whole = math.ceil(value) if is_lower else math.floor(value)
    if whole not in INT64:
        return None
    if whole == INT64[-1]:
        return whole
    nearest = _inwards(whole, is_lower)
    if nearest > INT64[-1]:
        return INT64[-1]
    if nearest < LOWEST_INT:
        return LOWEST_INT if is_lower else None
    return int(nearest)


def _float_bound(value: Number, is_lower: bool) -> Number | None:
    outwards = value < 0 if is_lower else value > 0
    if abs(value) > LARGEST:
        return math.copysign(LARGEST, value) if outwards else None
    if abs(value) <= EXACT and isinstance(value, int):
        return value
    if 0 < abs(value) < SMALLEST:
        return 0 if outwards else math.copysign(SMALLEST, value)
    return _inwards(value, is_lower)


def _inwards(value: Number, is_lower: bool) -> float:
    """The float at `value`, or the next one above a lower and below an upper bound."""
    near = float(value)
    if is_lower and near < value:
        return math.nextafter(near, math.inf)
    return math.nextafter(near, -math.inf) if not is_lower and near > value else near


def _may_be_integer(schema: Schema) -> bool:
    kind = schema.get("type")
    return "integer" in (kind if isinstance(kind, list) else [kind]) or "multipleOf" in schema


def _check_data(schema: Schema, path: Path, has_integers: bool) -> None:
    """Values of const and enum are written as they are; where they must be integers, llguidance clips large floats."""
    for key in ("const", "enum"):
        for value in _leaves(schema.get(key)):
            number = _number(value)
            if number is None:
                continue
            is_kept = _is_kept_float(number, has_integers) if isinstance(number, float) else _is_written_exactly(number)
            if not is_kept:
                raise RefusedError(f"{shown(path, key)}: {value} cannot be written exactly; use a string")


def _is_kept_float(value: float, has_integers: bool) -> bool:
    return math.isfinite(value) and (abs(value) < -INT64[0] or not has_integers)


def _is_written_exactly(value: int) -> bool:
    return abs(value) <= EXACT or (LOWEST_INT <= value <= INT64[-1] and min(int(float(value)), INT64[-1]) == value)


def _leaves(value: Any) -> Iterator[Any]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        else:
            yield item


def _multiple_of(schema: Schema, path: Path) -> int:
    """The multiple without its point: 25 for 0.25, 300 for 3e2; 1 where there is none."""
    value = _number(schema.get("multipleOf"))
    if value is None:
        return 1
    if not _is_finite(value) or value <= 0:
        raise RefusedError(f"{shown(path, 'multipleOf')}: {value} is not above 0")
    _, digits, exponent = Decimal(str(value)).as_tuple()
    zeros = min(max(int(exponent), 0), len(str(MAX_MULTIPLE)))
    return int("".join(map(str, digits))) * 10**zeros or 1
