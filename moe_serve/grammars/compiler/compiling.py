"""One grammar, from a client's text to a matcher before its first token.

Runs in a process that may die of it. Knows llguidance; knows no sockets.
"""

from __future__ import annotations

import json

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from moe_serve.grammars.compiler import lark_checks
from moe_serve.grammars.refusal import RefusedError
from moe_serve.grammars.schema import rewrite
from moe_serve.grammars.whitespace import JSON_WHITESPACE
from moe_serve.scheduling.sequence import GrammarKind

MAX_MESSAGE = 300
"""Characters of an error that are shown."""
MAX_ROW_ITEMS = 20_000
"""Alternatives at one place; llguidance's own limit of 2000 is passed by a choice of 2001 texts."""


def compile_grammar(kind: str, text: str, tokenizer: LLTokenizer) -> LLMatcher:
    """RefusedError says why a grammar cannot be followed."""
    try:
        grammar = _grammar(GrammarKind(kind), text)
        limits = LLParserLimits(verbose_errors=False, max_items_in_row=MAX_ROW_ITEMS)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    except RefusedError:
        raise
    except (MemoryError, RecursionError) as error:
        raise RefusedError("it is nested too deeply, or too large") from error
    except Exception as error:  # the converters raise ValueError, GbnfToLarkError and others
        raise RefusedError(_shown(str(error))) from error
    if matcher.is_error():
        raise RefusedError(_shown(matcher.get_error()))
    _require_a_first_token(matcher)
    return matcher


def _grammar(kind: GrammarKind, text: str) -> str:
    """llguidance's own form of a grammar, after our checks."""
    if kind is GrammarKind.JSON_SCHEMA:
        schema = json.dumps(rewrite.checked(rewrite.parse(text)))
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_WHITESPACE})
    if kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(text)
    return LLMatcher.grammar_from_lark(lark_checks.checked(gbnf_to_lark(text) if kind is GrammarKind.GBNF else text))


def _require_a_first_token(matcher: LLMatcher) -> None:
    """A grammar may compile and still lead nowhere, or need more than the parser's limits at once."""
    probe = matcher.deep_copy()
    mask = probe.compute_bitmask()
    if probe.is_error():
        raise RefusedError(f"no text can follow it: {_shown(probe.get_error())}")
    if not any(mask):
        raise RefusedError("it allows no first token")


def _shown(error: str) -> str:
    """The end of an error that quotes the grammar is of no use."""
    text = error.replace("\n<non-verbose/>", "").strip()
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."
