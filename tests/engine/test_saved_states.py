"""Saved states: which row holds what, where prompts are cut for them, and that no row is lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.scheduling.batch_plan import BatchPlan, SavedAt, StepResult
from moe_serve.scheduling.saved_states import SavedStates

from .driving import SchedulerDriver, make_seq


def driver(**limits: Any) -> SchedulerDriver:
    """Pages of 4 and blocks of 8 tokens."""
    return SchedulerDriver(**{"state_block": 8, "num_saved_states": 4, **limits})


def run_alone(of: SchedulerDriver, tokens: list[int], **params: Any) -> BatchPlan:
    """The first step of a prompt that has the engine for itself."""
    of.scheduler.add(make_seq(tokens, max_tokens=2, **params))
    plan = of.step()
    of.run()
    of.scheduler.prefixes.check_integrity()
    return plan


def test_a_prompt_goes_on_from_the_last_block_of_one_that_began_alike() -> None:
    of = driver()
    first = run_alone(of, list(range(21))).scheduled[0]
    assert (first.start, first.restored, first.saves) == (0, None, (SavedAt(16, 0),))
    second = run_alone(of, [*range(21), 7, 7, 7, 7]).scheduled[0]
    assert (second.start, second.restored, second.saves) == (16, 0, (SavedAt(24, 1),))


def test_pages_without_a_state_are_computed_again_and_the_next_time_there_is_one() -> None:
    of = driver()
    run_alone(of, list(range(30)))
    other = run_alone(of, [*range(13), 50, 51, 52, 53]).scheduled[0]
    assert (other.start, [place for place, _ in other.saves]) == (0, [8, 16])
    third = run_alone(of, [*range(13), 60, 61, 62, 63]).scheduled[0]
    assert third.start == 8


def test_a_chunk_ends_with_a_block() -> None:
    of = driver(max_num_batched_tokens=13)
    of.scheduler.add(make_seq(range(30), max_tokens=3))
    counts = [of.step().scheduled[0].count for _ in range(4)]
    assert counts == [8, 8, 8, 6]


def test_the_earlier_state_of_one_prompt_is_given_up_first() -> None:
    of = driver(max_num_batched_tokens=8, num_saved_states=2)
    run_alone(of, list(range(30)))
    saved = of.scheduler.prefixes.saved
    assert saved.num_used == 2
    again = make_seq(range(30), max_tokens=1)
    of.scheduler.add(again)
    assert of.step().scheduled[0].start == 24


def test_pages_of_an_answer_are_not_offered_to_prompts() -> None:
    """Its tokens went through other kernels than a prompt's."""
    of = driver()
    seq = make_seq(range(8), max_tokens=12)
    of.scheduler.add(seq)
    of.run()
    plan = run_alone(of, [*seq.token_ids, 1, 2])
    assert plan.scheduled[0].start == 8


def test_prefixes_of_two_salts_stay_apart() -> None:
    of = driver()
    run_alone(of, list(range(20)))
    other = make_seq(range(20), max_tokens=1)
    other.prefix_root = b"another key"
    of.scheduler.add(other)
    assert of.step().scheduled[0].restored is None


def test_a_late_token_is_computed_from_the_last_saved_state_again() -> None:
    """The sequence's own state has the token already."""
    of = driver()
    seq = make_seq(range(12), max_tokens=2)
    of.scheduler.add(seq)
    plan = of.scheduler.schedule()
    of.scheduler.update(plan, StepResult((1,), (None,), late=frozenset({seq})))
    assert (seq.num_computed, seq.token_ids) == (0, list(range(12)))
    again = of.step().scheduled[0]
    assert (again.start, again.restored) == (8, 0)


def test_rows_that_are_lost_or_shared_are_found() -> None:
    saved = SavedStates(2)
    row = saved.take()
    assert row is not None
    saved.check_integrity([row])
    with pytest.raises(AssertionError):
        saved.check_integrity([])
    saved.register(row, b"x")
    with pytest.raises(AssertionError):
        saved.check_integrity([row])


def test_without_rows_nothing_is_saved() -> None:
    assert SavedStates(0).take() is None


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.booleans()), min_size=1, max_size=10),
    num_pages=st.integers(13, 30),
    budget=st.integers(8, 40),
    max_seqs=st.integers(1, 6),
    rows=st.integers(0, 5),
)
def test_every_sequence_gets_exactly_its_tokens(
    prompts: list[tuple[int, int, bool]], num_pages: int, budget: int, max_seqs: int, rows: int
) -> None:
    """Whatever the pressure; and a run within a prompt begins and ends with a block."""
    of = driver(num_pages=num_pages, max_num_batched_tokens=budget, max_num_seqs=max_seqs, num_saved_states=rows)
    seqs = [make_seq([int(shared) * 7] * length, max_tokens=out) for length, out, shared in prompts]
    for seq in seqs:
        of.scheduler.add(seq)
    of.run(limit=5000)
    of.scheduler.prefixes.check_integrity()
    assert [s.output_token_ids for s in seqs] == [
        [1000 + p for p in range(s.num_prompt, s.max_total_tokens)] for s in seqs
    ]
    for item in (item for plan in of.plans for item in plan.scheduled):
        assert item.start >= item.seq.num_prompt or item.start % 8 == 0
        assert item.end >= item.seq.num_prompt or item.end % 8 == 0
        assert all(item.start < place <= item.end and place % 8 == 0 for place, _ in item.saves)
