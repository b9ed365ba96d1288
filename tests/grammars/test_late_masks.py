"""A mask that is not there in time: its row is late, the others have theirs, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from moe_serve.grammars.grammars import Grammars
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec, Sequence
from moe_serve.text.tokenizer import Tokenizer
from tests.grammars.hostile import slow_gbnf
from tests.grammars.walking import allowed, hold_up, masks_now, masks_of, sequence
from tests.patience import on_a_quiet_moment

SHORT_S = 2.0
"""Far above what a step waits, far below what compiling the slow grammar takes."""
SLOW_STEPS = GrammarSpec(
    GrammarKind.LARK,
    "start: "
    + " | ".join(f"r{i}" for i in range(1500))
    + "\n"
    + "\n".join(f'r{i}: "x" r{i} "{i}" | "y"' for i in range(1500)),
    "guided_grammar",
)
"""Its masks take longer with every token."""


@pytest.fixture
def own(tokenizer: Tokenizer) -> Iterator[Grammars]:
    own = Grammars.of(tokenizer, tokenizer.vocab_size, frozenset(tokenizer.eos_token_ids))
    yield own
    own.close()


def regex(text: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.REGEX, text, "guided_regex")


def pid_of(seq: Sequence) -> int:
    return int(seq.matcher.process().pid)  # type: ignore[union-attr]


def test_a_process_that_is_held_up_makes_its_own_rows_late(own: Grammars, tokenizer: Tokenizer) -> None:
    held, twin, other = sequence(own, regex("[ab]+c")), sequence(own, regex("[ab]+c")), sequence(own, regex("x+"))
    assert not masks_of(tokenizer, held, twin, other).errors
    letter = allowed(masks_of(tokenizer, held), 0, tokenizer.vocab_size)[0]
    hold_up(pid_of(held))
    held.token_ids.append(letter)
    start_s = time.monotonic()

    def check() -> None:
        masks = masks_now(tokenizer, held, other)
        assert masks.late == {held}
        assert allowed(masks, 1, tokenizer.vocab_size)

    for _ in range(10):
        on_a_quiet_moment(check)
    assert masks_now(tokenizer, twin, other).late == {twin}, "a process that works is not asked for more"
    assert time.monotonic() - start_s < SHORT_S
    os.kill(pid_of(held), signal.SIGCONT)
    twin.token_ids.append(letter)
    masks = masks_of(tokenizer, held, twin)
    assert not masks.errors
    assert allowed(masks, 0, tokenizer.vocab_size) == allowed(masks, 1, tokenizer.vocab_size)


def test_a_grammar_that_is_being_compiled_makes_its_own_rows_late(own: Grammars, tokenizer: Tokenizer) -> None:
    own.check(regex("x+"))
    slow, other = sequence(own, slow_gbnf(1)), sequence(own, regex("x+"))
    start_s = time.monotonic()

    def check() -> None:
        masks = masks_now(tokenizer, slow, other)
        assert masks.late == {slow}
        assert masks.rows == [1]

    for _ in range(10):
        on_a_quiet_moment(check)
    assert time.monotonic() - start_s < SHORT_S
    slow.matcher.close()  # type: ignore[union-attr]


def test_slow_masks_of_one_grammar_hold_up_no_step(own: Grammars, tokenizer: Tokenizer) -> None:
    own.check(SLOW_STEPS)
    own.check(regex("x+"))
    slow, other = sequence(own, SLOW_STEPS), sequence(own, regex("x+"))
    (letter,) = tokenizer.encode("x", add_special_tokens=False)
    masks_of(tokenizer, slow, other)
    num_late = 0
    deadline_s = time.monotonic() + 20
    while not num_late and time.monotonic() < deadline_s:
        slow.token_ids.append(letter)
        masks = masks_now(tokenizer, slow, other)
        assert masks.rows[-1] == 1
        num_late += slow in masks.late
        assert not masks_of(tokenizer, slow, other).errors
    assert num_late, "its masks take long enough for this test to mean something"
