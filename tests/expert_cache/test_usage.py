"""Counting what routers chose, and judging what was advised."""

from __future__ import annotations

import pytest

from expert_cache.running.usage import ExpertUsage

from .stores import FIRST, SECOND


@pytest.fixture
def usage() -> ExpertUsage:
    return ExpertUsage(2, 4)


def outcome(usage: ExpertUsage) -> tuple[list[int], ...]:
    return tuple(values.tolist() for values in usage.predictions().values())


def test_tokens_add_up_by_layer_and_expert(usage: ExpertUsage) -> None:
    usage.use(FIRST, [0, 2], [5, 1])
    usage.use(FIRST, [2], [3])
    usage.use(SECOND, [3], [7])
    assert usage.tokens().tolist() == [[5, 0, 4, 0], [0, 0, 0, 7]]


def test_advice_is_judged_against_what_was_used(usage: ExpertUsage) -> None:
    usage.expect(SECOND, [0, 1, 2])
    usage.use(SECOND, [1, 3], [1, 1])
    assert outcome(usage) == ([0, 1], [0, 2], [0, 1])


def test_the_last_word_before_the_step_counts(usage: ExpertUsage) -> None:
    usage.expect(SECOND, [0, 1])
    usage.expect(SECOND, [2, 3])
    usage.use(SECOND, [2, 3], [1, 1])
    assert outcome(usage) == ([0, 2], [0, 0], [0, 0])


def test_advice_is_judged_once_and_a_step_without_any_not_at_all(usage: ExpertUsage) -> None:
    usage.use(FIRST, [0], [1])
    usage.expect(FIRST, [0])
    usage.use(FIRST, [0], [1])
    usage.use(FIRST, [2], [1])
    assert outcome(usage) == ([1, 0], [0, 0], [0, 0])


def test_what_was_taken_stays_as_it_was(usage: ExpertUsage) -> None:
    before = usage.tokens()
    usage.use(FIRST, [0], [1])
    assert before.sum() == 0
