"""Hostile and odd grammars: refused by the name of their field, or followed with the right value; nothing else dies."""

from __future__ import annotations

import json
import time
from contextlib import suppress

import pytest

from moe_serve.errors import InvalidRequestError
from moe_serve.grammars.grammars import Grammars
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec
from moe_serve.text.tokenizer import Tokenizer
from tests.grammars.hostile import FOLLOWED, LIMITED, REFUSED, schema
from tests.grammars.walking import walk
from tests.patience import PATIENCE_S


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_its_field(grammars: Grammars, name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        grammars.check(REFUSED[name])
    assert caught.value.param == REFUSED[name].param
    assert caught.value.message.startswith(f"{REFUSED[name].param}: ")
    assert len(caught.value.message) < 500
    assert "takes longer" not in caught.value.message, "it is refused for what it says, not for its time"


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITED)
def test_what_is_large_ends_within_the_limits(grammars: Grammars, name: str) -> None:
    start = time.monotonic()
    with suppress(InvalidRequestError):
        grammars.check(LIMITED[name])
    assert time.monotonic() - start < PATIENCE_S, "limits count CPU time; by the clock a busy machine takes longer"
    grammars.check(GrammarSpec(GrammarKind.REGEX, f"after {name}"))


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_can_be_followed_gives_the_right_values(grammars: Grammars, tokenizer: Tokenizer, name: str) -> None:
    value, holds = FOLLOWED[name]
    texts = [walk(grammars, tokenizer, schema(value), seed) for seed in range(6)]
    complete = [text for text, is_complete in texts if is_complete]
    assert complete, texts
    assert [text for text in complete if not holds(json.loads(text))] == []


def test_a_choice_of_10_000_texts_works(grammars: Grammars, tokenizer: Tokenizer) -> None:
    choices = [f"c{i}" * 20 for i in range(10_000)]
    spec = GrammarSpec(GrammarKind.LARK, "start: " + " | ".join(map(json.dumps, choices)), "guided_choice")
    text, is_complete = walk(grammars, tokenizer, spec, seed=0)
    assert is_complete
    assert text in choices
