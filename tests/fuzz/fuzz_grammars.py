"""Fuzz grammars: any schema, Lark text, GBNF text or pattern is followed, or refused by its field. Nothing dies.

    python tests/fuzz/fuzz_grammars.py --minutes 10
    python tests/fuzz/fuzz_grammars.py --minutes 10 --server      end to end, as watched_server.py watches it

Schemas use every keyword, with likely and extreme values, references in circles, and chains. What compiles is walked
with random tokens; complete JSON is judged by jsonschema. A process that dies, or passes a limit, fails the run.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
from hypothesis import Phase
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))
from moe_serve.errors import InvalidRequestError
from moe_serve.grammars.grammars import Grammars
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec
from moe_serve.text.tokenizer import Tokenizer
from tests.fuzz.harness import arguments, demo_tokenizer, fuzz_for_minutes
from tests.fuzz.loader import run_examples
from tests.fuzz.watched_server import watched_server
from tests.grammars.walking import walk

EXTREME = [
    *(0, 1, -1, 2, 5, 7, 100, 0.5, -0.5, 1e-9, 1e-300, 5e-324, 1e15, 9e18, 1e19, -1e19, 1e20, 1e308, -1e308),
    *(2**31, 2**32, 2**53, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**20),
    *(-(2**53), -(2**63), -(2**63) - 1, -(10**20)),
    *(9223372036854774784, -9223372036854774784, -9223372036854775807, 10**40, 99991, 1e-10),
]
NUMBERS = st.sampled_from(EXTREME) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
SIZES = st.sampled_from([0, 1, 2, 3, 10, 1000, 10**6, 10**7, 2**32, 2**64, -1, 1.0])
NAMES = st.sampled_from(["a", "b", "W[int]", "x y", "minimum", "$ref", "é", ""])
WORDS = st.sampled_from(
    ["date", "date-time", "time", "duration", "email", "ipv4", "ipv6", "uuid", "uri", "hostname", "int64", "password"]
)
PATTERNS = st.sampled_from(
    [r"^a+$", r"[a-z]{2,5}", r"(a|b)*c", r"^$", r"\d{1,1000}", r"(?=a)", r"(", r"a{100000}", r"\p{L}+", r"^.{3}$"]
)
KINDS = ["object", "array", "string", "number", "integer", "boolean", "null", "any"]
TYPES = st.sampled_from([*KINDS, ["string", "null"], ["integer", "object"], [], 5])
DATA = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
PLACES = [
    "#",
    "#/$defs/a",
    "#/$defs/b",
    "#/$defs/W[int]",
    "#/$defs/W%5Bint%5D",
    "#/properties/a",
    "#/x",
    "http://x/y",
    "a%zz",
]
REFS = st.sampled_from(PLACES)
PLAIN: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), NUMBERS),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), NUMBERS | st.booleans()),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), SIZES),
    **dict.fromkeys(("title", "description", "default", "examples", "$comment", "deprecated", "x-anything"), DATA),
    "const": DATA,
    "enum": st.lists(DATA, max_size=4),
    "format": WORDS | DATA,
    "pattern": PATTERNS,
    "type": TYPES,
    "required": st.lists(NAMES, max_size=3),
    "$ref": REFS,
    "$schema": st.sampled_from(["https://json-schema.org/draft/2020-12/schema", "urn:x"]),
    "uniqueItems": st.booleans(),
}


def _with_parts(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    named = st.dictionaries(NAMES, inner, max_size=3)
    parts = {
        **dict.fromkeys(("properties", "$defs", "patternProperties", "dependentSchemas"), named),
        **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), st.lists(inner, min_size=1, max_size=3)),
        **dict.fromkeys(("items", "additionalProperties", "additionalItems", "not", "if", "contains"), inner),
    }
    return _some_of({**PLAIN, **parts})


def _some_of(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    chosen = st.lists(st.sampled_from(sorted(fields)), unique=True, max_size=5)
    return chosen.flatmap(lambda keys: st.fixed_dictionaries({key: fields[key] for key in keys}))


SCHEMAS = st.recursive(_some_of(PLAIN) | st.booleans(), _with_parts, max_leaves=6).filter(lambda s: isinstance(s, dict))
CHAINS = st.builds(
    lambda length, link, end: {
        "$ref": "#/$defs/n0",
        "$defs": {**{f"n{i}": link(f"#/$defs/n{i + 1}") for i in range(length)}, f"n{length}": end},
    },
    st.sampled_from([3, 100, 1500]),
    st.sampled_from(
        [
            lambda ref: {"allOf": [{"$ref": ref}]},
            lambda ref: {"anyOf": [{"type": "null"}, {"$ref": ref}]},
            lambda ref: {"type": "array", "items": {"$ref": ref}, "minItems": 1, "maxItems": 1},
            lambda ref: {"type": "object", "properties": {"a": {"$ref": ref}}, "additionalProperties": False},
        ]
    ),
    SCHEMAS,
)
TERMS = ['"a"', '"b"i', "/[a-z]+/", "a", "b", "c", "A", "B", "<eos>", "/(/", '""']
ATOMS = st.sampled_from([*TERMS, "%json {}", '%json {"type": "integer", "multipleOf": 7}'])
ITEMS = st.recursive(
    st.builds(
        "{}{}".format, ATOMS, st.sampled_from(["", "", "*", "+", "?", "{2,5}", "{0,1000000}", "~3", "{1000000}"])
    ),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({' '.join(parts)})")
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"[{' | '.join(parts)}]")
    ),
    max_leaves=6,
)
RULES = st.lists(ITEMS, min_size=1, max_size=4).map(" | ".join)
LARK = st.tuples(RULES, RULES, RULES, RULES).map(
    lambda r: f"start: {r[0]}\na: {r[1]}\nb: {r[2]}\nc: {r[3]}\nA: /x+/\nB: A A\n"
)
GBNF = st.tuples(RULES, RULES).map(lambda r: f"root ::= {r[0]}\na ::= {r[1]}\n") | st.text(max_size=40)
REGEX = st.lists(PATTERNS, min_size=1, max_size=4).map("|".join) | st.text(max_size=30)
TEXTS = {
    GrammarKind.JSON_SCHEMA: (SCHEMAS | SCHEMAS | CHAINS).map(json.dumps),
    GrammarKind.LARK: LARK | st.text(max_size=60),
    GrammarKind.GBNF: GBNF,
    GrammarKind.REGEX: REGEX,
}  # fmt: skip
SIGNALS = ("(SIGSEGV)", "(SIGABRT)", "(SIGBUS)", "ended with status")


def check(grammars: Grammars, tokenizer: Tokenizer, kind: GrammarKind, text: str) -> None:
    """Refused by its field and for a reason of ours, or followed; AssertionError says what else happened."""
    spec = GrammarSpec(kind, text, "guided")
    if (refusal := _refusal(grammars, spec)) is not None:
        assert refusal.param == "guided"
        assert not any(name in refusal.message for name in SIGNALS), refusal.message
        return
    produced, is_complete = walk(grammars, tokenizer, spec, seed=len(text), most=30)
    if is_complete and kind is GrammarKind.JSON_SCHEMA:
        judge(json.loads(text), produced)


def _refusal(grammars: Grammars, spec: GrammarSpec) -> InvalidRequestError | None:
    try:
        grammars.check(spec)
    except InvalidRequestError as error:
        return error
    return None


def judge(schema: Any, produced: str) -> None:
    """Numbers, above all: what is written lies within the bounds that the client wrote."""
    try:
        errors = list(jsonschema.Draft202012Validator(schema).iter_errors(json.loads(produced)))
    except Exception:  # a schema that jsonschema cannot read: draft 4, a reference that leads nowhere
        return
    bounds = [e for e in errors if e.validator in ("minimum", "maximum", "const", "enum", "type", "required")]
    assert not bounds, f"{produced!r}: {bounds[0].message}"


def run(grammars: Grammars, tokenizer: Tokenizer, kind: GrammarKind, seed: int, examples: int) -> int:
    return judge_examples(lambda text: check(grammars, tokenizer, kind, text), kind, seed, examples)


def judge_examples(judged: Callable[[str], None], kind: GrammarKind, seed: int, examples: int) -> int:
    """Give texts of a kind to `judged`; how many it got. A failing one is made smaller."""
    return run_examples(TEXTS[kind], judged, seed, examples, (Phase.generate, Phase.shrink))


FIELDS = {
    GrammarKind.JSON_SCHEMA: "guided_json",
    GrammarKind.LARK: "guided_grammar",
    GrammarKind.GBNF: "guided_grammar",
    GrammarKind.REGEX: "guided_regex",
}
SERVER_EXAMPLES = 25


def check_over_http(url: str, kind: GrammarKind, text: str) -> None:
    """As `check`, with a server's own model: an answer that fits as far as it goes, or a 400 that names the field."""
    field = FIELDS[kind]
    body = {"prompt": "Once", "max_tokens": 20, "temperature": 1, "seed": 1, field: text}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code in (200, 400, 503), answer.text
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert error["param"] == field, error
        assert not any(name in error["message"] for name in SIGNALS), error
    elif answer.status_code == 200:
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] == "stop" and kind is GrammarKind.JSON_SCHEMA:
            judge(json.loads(text), choice["text"])


@contextmanager
def served() -> Iterator[tuple[dict[str, Callable[[int, int], int]], Callable[[], dict[str, Any]]]]:
    """What fuzzes each kind of grammar over HTTP, and what is known of the server afterwards."""
    with watched_server() as watched:

        def of(kind: GrammarKind) -> Callable[[int, int], int]:
            def run(seed: int, examples: int) -> int:
                check = functools.partial(check_over_http, watched.url, kind)
                count = judge_examples(check, kind, seed, min(examples, SERVER_EXAMPLES))
                watched.check()
                return count

            return run

        yield {kind.value: of(kind) for kind in TEXTS}, watched.report


@contextmanager
def opened() -> Iterator[dict[str, Callable[[int, int], int]]]:
    """What fuzzes each kind of grammar, over processes that end with the block."""
    tokenizer = demo_tokenizer()
    grammars = Grammars.of(tokenizer, tokenizer.vocab_size, frozenset(tokenizer.eos_token_ids))

    def of(kind: GrammarKind) -> Callable[[int, int], int]:
        return lambda seed, examples: run(grammars, tokenizer, kind, seed, examples)

    try:
        yield {kind.value: of(kind) for kind in TEXTS}
    finally:
        grammars.close()


if __name__ == "__main__":
    parser = arguments()
    parser.add_argument("--server", action="store_true", help="against a server process, over HTTP")
    if parser.parse_args().server:
        with served() as (properties, report):
            fuzz_for_minutes(properties, report, parser)
    else:
        with opened() as properties:
            fuzz_for_minutes(properties, parser=parser)
