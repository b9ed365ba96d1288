"""Grammars that ended the server, held it up, or came back wrong, each by the name of what it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec

FIELD = "guided_json"


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(value), FIELD)


def lark(text: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.LARK, text, FIELD)


def chain(length: int, body: Callable[[int], str], end: str = '"a"') -> str:
    """`length` rules, each a line of `body(i)`, after `start`."""
    return "\n".join(["start: a0", *(f"a{i}: {body(i)}" for i in range(length)), f"a{length}: {end}"])


def slow_gbnf(number: int) -> GrammarSpec:
    """Takes more than 10 s; each number is another text."""
    rules = "\n".join(f'r{i} ::= "x{number}" r{i + 1}' for i in range(6000))
    return GrammarSpec(GrammarKind.GBNF, f'root ::= r0\n{rules}\nr6000 ::= "y"', "guided_grammar")


def references(length: int, link: Callable[[str], Any]) -> Any:
    """A schema that reaches its last definition over `length` references."""
    links = {f"a{i}": link(f"#/$defs/a{i + 1}") for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "string"}}}


def nullable_items(ref: str) -> Any:
    return {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": ref}}]}


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
ENDLESS = {
    "$ref": "#/$defs/N",
    "$defs": {"N": {"type": "object", "properties": {"next": {"$ref": "#/$defs/N"}}, "required": ["next"]}},
}
ENDLESS_LIST = {"$ref": "#/$defs/L", "$defs": {"L": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/L"}}}}
MUTUAL = {
    "$ref": "#/$defs/a",
    "$defs": {
        "a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "required": ["b"]},
        "b": {"allOf": [{"type": "array", "prefixItems": [{"$ref": "#/$defs/a"}], "minItems": 1}]},
    },
}

REFUSED: dict[str, GrammarSpec] = {
    "one integer far below 64 bits": schema({"type": "integer", "minimum": -(10**20), "maximum": -(10**20)}),
    "integers above 64 bits": schema({"type": "integer", "minimum": 10**19, "maximum": 2 * 10**19}),
    "integers above, as a float": schema({"type": "integer", "minimum": 1e30, "maximum": 1e31}),
    "the upper bound of 64 bits without sign": schema({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}),
    "the lowest 64-bit integer as a value": schema({"pattern": "^a+$", "enum": [-(2**63)]}),
    "the lowest 64-bit integer, as a float": schema({"type": "integer", "enum": [-(2.0**63)]}),
    "an integer of 10^19, as a float": schema({"allOf": [{"type": "integer"}, {"const": 1e19}]}),
    "an integer of -10^300, as a float": schema({"type": ["integer", "null"], "enum": [-1e300]}),
    "the lowest 64-bit integer in a value": schema({"const": {"a": [-(2**63)]}}),
    "the lowest 64-bit integer alone": schema({"type": "integer", "minimum": -(2**63), "maximum": -(2**63)}),
    "an odd integer beyond a float's precision": schema(
        {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 1}
    ),
    "a constant beyond a float's precision": schema({"const": 2**53 + 1}),
    "a constant beyond 64 bits": schema({"enum": [1, {"a": [2**64 - 1]}]}),
    "a number without a largest": schema({"type": "number", "minimum": 1e20}),
    "infinity": GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "number", "minimum": 1e400}', FIELD),
    "a million and one items": schema({"type": "array", "minItems": 1_000_001}),
    "a multiple of 99,999,989 in Lark, escaped": lark('start: %json {"type":"integer","multiple\\u004ff":99999989}'),
    "a multiple of 999,983": lark('start: "a" %json {"type":"integer","multipleOf":999983} "b"'),
    "a multiple of 99,991": schema({"type": "integer", "multipleOf": 99991}),
    "a multiple of 99,991, escaped": GrammarSpec(GrammarKind.JSON_SCHEMA, '{"multiple\\u004ff": 99991}', FIELD),
    "multiples of two primes": schema({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}),
    "10,000 properties": schema({"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(10000)}}),
    "50,000 rules": lark(chain(50_000, lambda i: f'"x" a{i + 1}')),
    "20,000 terminals": lark(chain(20_000, lambda i: f"a{i + 1}").replace("a", "A").replace("stArt", "start")),
    "a reference to itself": schema(LOOP),
    "a document that is itself": schema({"$ref": "#"}),
    "an object that requires itself": schema(ENDLESS),
    "a list that holds itself": schema(ENDLESS_LIST),
    "two that require each other": schema(MUTUAL),
    "an object that requires itself, in Lark": lark(f"start: %json {json.dumps(ENDLESS)}"),
    "a rule that leads to itself": lark('start: "a" start'),
    "rules that lead to each other": lark('start: "x" b c?\nb: ("y" c)+ | c "z"\nc: "(" b ")"'),
    "more alternatives than the parser holds": lark('start: "x" c\nc: ' + " | ".join(f'"c{i}"' for i in range(30_000))),
    "50,000 parentheses": lark("start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "a pattern of 100,000 parentheses": GrammarSpec(GrammarKind.REGEX, "(" * 10**5 + "a" + ")" * 10**5, FIELD),
    "100,000 levels": GrammarSpec(GrammarKind.JSON_SCHEMA, '{"items":' * 10**5 + "{}" + "}" * 10**5, FIELD),
    "five million characters": GrammarSpec(GrammarKind.REGEX, "a" * 5_000_000, FIELD),
}

LIMITED: dict[str, GrammarSpec] = {
    "8000 rules, each the next": lark(chain(8000, lambda i: f"a{i + 1}")),
    "8000 rules with texts": lark(chain(8000, lambda i: f'"x" a{i + 1}')),
    "9000 terminals": lark(chain(9000, lambda i: f"a{i + 1}").replace("a", "A").replace("stArt", "start")),
    "5000 references to nullable lists": schema(references(5000, nullable_items)),
    "20,000 references in allOf": schema(references(20_000, lambda ref: {"allOf": [{"$ref": ref}]})),
    "4000 properties": schema({"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(4000)}}),
    "3000 rules in GBNF": GrammarSpec(
        GrammarKind.GBNF,
        "\n".join(["root ::= r0", *(f'r{i} ::= "x" r{i + 1}' for i in range(3000)), 'r3000 ::= "y"']),
        FIELD,
    ),
    "6000 rules in GBNF": slow_gbnf(0),
}
"""May be followed or refused, within the limit of time and without harm to others."""


def between(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: low <= value <= high


def has_type(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def one_of(values: Sequence[Any]) -> Callable[[Any], bool]:
    return lambda value: value in values


def defined(name: str, ref: str) -> Any:
    return {"$ref": f"#/$defs/{ref}", "$defs": {name: {"enum": [5]}}}


LARGE = {"minimum": -1e20, "maximum": 1e20}
ODD = 2**53 + 1
LOW = -(2**63) + 2000
CHAIN = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
    "required": ["next"],
    "additionalProperties": False,
}
KEYWORDS = {
    "type": "object",
    "properties": {"minimum": {"enum": [1]}, "format": {"enum": ["x"]}},
    "required": ["minimum", "format"],
    "additionalProperties": False,
}


def integer(low: int, high: int, **more: Any) -> tuple[Any, Callable[[Any], bool]]:
    return {"type": "integer", "minimum": low, "maximum": high, **more}, between(low, high)


FOLLOWED: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "large floats": ({"type": "number", **LARGE}, between(-1e20, 1e20)),
    "from 0 to 2**64": ({"type": "number", "minimum": 0, "maximum": 2**64}, between(0, 2**64)),
    "up to the largest float": ({"type": "number", "minimum": 5, "maximum": 1e308}, between(5, 1e308)),
    "large floats, exclusive": (
        {"type": "number", "exclusiveMinimum": -1e300, "exclusiveMaximum": -1},
        between(-1e300, -1),
    ),
    "tiny floats": ({"type": "number", "minimum": 1e-300, "maximum": 1}, between(1e-300, 1)),
    "all 64-bit integers": integer(-(2**63), 2**63 - 1),
    "the largest 64-bit integer": integer(2**63 - 1, 2**63 - 1),
    "odd bounds beyond 2**53": integer(ODD, ODD + 2),
    "next to the lowest integer": integer(LOW, LOW + 9000),
    "large bounds on either kind": ({"allOf": [{"type": "integer"}, LARGE]}, between(-1e20, 1e20)),
    "a multiple of 19,997": ({"type": "integer", "multipleOf": 19997}, lambda value: value % 19997 == 0),
    "an unknown format": ({"type": "string", "format": "password", "maxLength": 4}, has_type(str)),
    "a format that is no text": integer(0, 9, format=None),
    "an unknown format further in": (
        {"anyOf": [{"type": "string", "maxLength": 3, "format": "json-string"}]},
        has_type(str),
    ),
    "a document's own dialect": ({"$schema": "urn:mine", "enum": [5]}, one_of([5])),
    "brackets in a reference": (defined("W[int]", "W[int]"), one_of([5])),
    "brackets, percent-encoded": (defined("W[int]", "W%5Bint%5D"), one_of([5])),
    "brackets, percent-encoded on both sides": (defined("W%5Bint%5D", "W%5Bint%5D"), one_of([5])),
    "angles, spaces and umlauts in a reference": (defined("Größe<a, b>", "Größe<a, b>"), one_of([5])),
    "a percent sign in a reference": (defined("100%", "100%"), one_of([5])),
    "a slash in a reference": (defined("a/b", "a~1b"), one_of([5])),
    "an object that may hold itself": (CHAIN, has_type(dict)),
    "properties called as keywords": (KEYWORDS, one_of([{"minimum": 1, "format": "x"}])),
    "large numbers in annotations": (
        {"enum": [5], "default": 10**30, "examples": [{"minimum": 10**30}]},
        one_of([5]),
    ),
}
"""Schema, and what holds of every value."""
