"""Scheduler: prompts whose log-probabilities are wanted. Which positions are scored, when, and what may be cached."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.sequence import Sequence

from .driving import MakeDriver, MakeSeq


def scored_tokens(seq: Sequence) -> list[int]:
    return [entry.token_id for entry in seq.prompt_logprobs]


def test_every_prompt_token_but_the_first_is_scored_once(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(max_num_batched_tokens=8)
    seq = make_seq(range(10), max_tokens=2, prompt_logprobs=0)
    driver.scheduler.add(seq)
    driver.run()
    assert driver.scored == [[[0, 1, 2, 3, 4, 5, 6, 7]], [[8]], [[]]]
    assert scored_tokens(seq) == list(range(1, 10))


def test_a_cached_prefix_is_not_used_but_left_for_others(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver()
    driver.scheduler.add(make_seq(range(10), max_tokens=1))
    driver.run()
    seq = make_seq(range(10), max_tokens=1, prompt_logprobs=0)
    driver.scheduler.add(seq)
    assert driver.step().scheduled[0].start == 0
    assert seq.num_cached == 0
    driver.run()
    assert scored_tokens(seq) == list(range(1, 10))
    driver.scheduler.add(make_seq(range(10), max_tokens=1))
    assert driver.step().scheduled[0].start == 8


def test_a_step_scores_only_so_many_tokens(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(max_scored_tokens=6)
    seqs = [make_seq(range(start, start + 10), max_tokens=1, prompt_logprobs=0) for start in (0, 100)]
    for seq in [*seqs, make_seq(range(200, 210), max_tokens=1)]:
        driver.scheduler.add(seq)
    driver.run()
    assert all(sum(map(len, step)) <= 6 for step in driver.scored)
    assert [scored_tokens(seq) for seq in seqs] == [list(range(1, 10)), list(range(101, 110))]


def test_without_chunked_prefill_a_prompt_is_scored_whole(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(max_scored_tokens=6, enable_chunked_prefill=False)
    driver.scheduler.add(make_seq(range(10), prompt_logprobs=0))
    driver.step()
    assert driver.scored == [[list(range(9))]]


def test_without_max_tokens_nothing_is_generated(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver()
    seq = make_seq(range(10), max_tokens=0, prompt_logprobs=0)
    driver.scheduler.add(seq)
    driver.run()
    assert (seq.finish_reason, seq.num_generated, len(seq.prompt_logprobs)) == (FinishReason.LENGTH, 0, 9)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=6),
    num_pages=st.integers(10, 20),
    budget=st.integers(1, 40),
    scores=st.integers(1, 12),
)
def test_preemption_loses_and_repeats_no_score(
    make_driver: MakeDriver,
    make_seq: MakeSeq,
    prompts: list[tuple[int, bool]],
    num_pages: int,
    budget: int,
    scores: int,
) -> None:
    driver = make_driver(num_pages=num_pages, max_num_batched_tokens=budget, max_scored_tokens=scores)
    seqs = [make_seq(range(length), 8, prompt_logprobs=0 if wanted else None) for length, wanted in prompts]
    for seq in seqs:
        driver.scheduler.add(seq)
    driver.run(3000)
    for seq, (length, wanted) in zip(seqs, prompts, strict=True):
        assert seq.num_generated == 8
        assert scored_tokens(seq) == (list(range(1, length)) if wanted else [])
