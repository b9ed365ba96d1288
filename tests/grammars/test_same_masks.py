"""Masks from the processes are those of llguidance in this process, token by token."""

from __future__ import annotations

import json
import random
from typing import Any

import llguidance.hf
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from moe_serve.grammars.grammars import Grammars
from moe_serve.grammars.whitespace import JSON_WHITESPACE
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec
from moe_serve.text.tokenizer import Tokenizer
from tests.grammars.walking import allowed, masks_of, sequence

ORDINARY: list[Any] = [
    {"type": "object"},
    {"type": "string", "pattern": "^[a-z]{2,5}$"},
    {"type": "string", "format": "date-time"},
    {"type": "number", "minimum": 0.5, "maximum": 99.25},
    {"type": "integer", "multipleOf": 7, "exclusiveMaximum": 100, "minimum": 1},
    {"enum": ["a", 5, None, {"b": [1.5]}]},
    {"anyOf": [{"const": "x"}, {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}]},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "next": {"$ref": "#/$defs/n"}},
        "required": ["name"],
        "additionalProperties": False,
        "$defs": {"n": {"type": ["object", "null"], "properties": {"again": {"$ref": "#/$defs/n"}}}},
    },
]
TEXTS = {
    GrammarKind.REGEX: [r"[ab]{3,5}c", r"(\d+,)*end"],
    GrammarKind.LARK: ['start: "a" NUM ("," NUM)*\nNUM: /[0-9]{2,3}/', 'start: %json {"type": "boolean"} "!"'],
}
SPECS = [
    *(GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(s)) for s in ORDINARY),
    *(GrammarSpec(kind, text) for kind, texts in TEXTS.items() for text in texts),
]


@pytest.fixture(scope="module")
def ll_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    return llguidance.hf.from_tokenizer(
        tokenizer.hf, n_vocab=tokenizer.vocab_size, eos_token=sorted(tokenizer.eos_token_ids)
    )


def in_process(tokenizer: LLTokenizer, spec: GrammarSpec) -> LLMatcher:
    makers = {
        GrammarKind.JSON_SCHEMA: lambda text: LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_pattern": JSON_WHITESPACE}
        ),
        GrammarKind.REGEX: LLMatcher.grammar_from_regex,
        GrammarKind.LARK: LLMatcher.grammar_from_lark,
    }
    return LLMatcher(tokenizer, makers[spec.kind](spec.text), log_level=0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.text[:40])
def test_masks_are_the_same_at_every_token(
    grammars: Grammars, tokenizer: Tokenizer, ll_tokenizer: LLTokenizer, spec: GrammarSpec
) -> None:
    expected, seq, rng = in_process(ll_tokenizer, spec), sequence(grammars, spec), random.Random(spec.text)
    for _ in range(40):
        masks = masks_of(tokenizer, seq)
        assert not masks.errors
        mask = np.zeros_like(masks.bits[0])
        expected.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        assert mask.tolist() == masks.bits[0].tolist()
        token = rng.choice(allowed(masks, 0, tokenizer.vocab_size))
        if token in tokenizer.eos_token_ids:
            break
        seq.token_ids.append(token)
        assert expected.consume_token(token)
    assert seq.num_generated
    assert seq.matcher is not None
    seq.matcher.close()
