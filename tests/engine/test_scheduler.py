"""Scheduler: budgets, chunks, sharing, preemption and endings, without a model."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.scheduling.finish import FinishReason

from .driving import MakeDriver, MakeSeq


def test_prompt_in_chunks_then_decode(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(max_num_batched_tokens=8)
    seq = make_seq(range(10), max_tokens=2)
    driver.scheduler.add(seq)
    counts = [driver.step().scheduled[0].count for _ in range(3)]
    assert counts == [8, 2, 1]
    assert seq.finish_reason is FinishReason.LENGTH
    assert seq.output_token_ids == [1010, 1011]


def test_decodes_come_before_prompts_in_the_budget(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(max_num_batched_tokens=8)
    first, second = make_seq(range(4)), make_seq(range(100, 120))
    driver.scheduler.add(first)
    driver.step()
    driver.scheduler.add(second)
    plan = driver.step()
    assert [(s.seq, s.count) for s in plan.scheduled] == [(first, 1), (second, 7)]


def test_without_chunked_prefill_a_prompt_waits_for_a_whole_step(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(max_num_batched_tokens=8, enable_chunked_prefill=False)
    driver.scheduler.add(make_seq(range(6)))
    driver.scheduler.add(make_seq(range(50, 56)))
    assert [s.count for s in driver.step().scheduled] == [6]
    assert [s.count for s in driver.step().scheduled] == [1, 6]


def test_max_num_seqs_bounds_the_batch(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(max_num_seqs=2)
    for i in range(4):
        driver.scheduler.add(make_seq([i]))
    assert len(driver.step().scheduled) == 2
    assert len(driver.scheduler.waiting) == 2


def test_second_request_reuses_the_first_ones_prefix(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver()
    driver.scheduler.add(make_seq(range(10), max_tokens=1))
    driver.run()
    again = make_seq([*range(10), 77], max_tokens=1)
    driver.scheduler.add(again)
    plan = driver.step()
    assert plan.scheduled[0].start == 8
    assert again.num_cached == 8
    assert plan.prefix_hit_tokens == 8
    assert plan.prefix_queried_tokens == 11


def test_an_identical_prompt_still_computes_its_last_token(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver()
    for _ in range(2):
        driver.scheduler.add(make_seq(range(8), max_tokens=1))
        driver.run()
    assert driver.plans[-1].scheduled[0].start == 4


def test_prefix_caching_off_shares_nothing(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(enable_prefix_caching=False)
    for _ in range(2):
        driver.scheduler.add(make_seq(range(12), max_tokens=1))
        driver.run()
    assert driver.plans[-1].scheduled[0].start == 0
    assert driver.pool.match([b"anything"]) == []


def test_samples_of_one_request_share_the_prompt(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver()
    leader = make_seq(range(9), max_tokens=2, n=2)
    follower = type(leader)(leader.request, 1, list(range(9)), 11)
    driver.scheduler.add(leader)
    driver.scheduler.add(follower)
    driver.step()
    assert follower.num_computed == 0
    driver.step()
    assert follower.num_cached == 8
    driver.run()
    assert list(follower.page_ids) == []


def test_preemption_takes_the_youngest_and_recomputes_it(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(num_pages=6, page_size=2, enable_prefix_caching=False)
    old, young = make_seq([1, 2, 3, 4], max_tokens=6), make_seq([5, 6, 7, 8], max_tokens=6)
    driver.scheduler.add(old)
    driver.scheduler.add(young)
    driver.run()
    assert young.num_preemptions > 0
    assert old.num_preemptions == 0
    assert old.output_token_ids == young.output_token_ids == [1004, 1005, 1006, 1007, 1008, 1009]


def test_eos_and_stop_ids_respect_min_tokens(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(eos=frozenset({1002, 1004}))
    early, late, ignoring = (
        make_seq([1, 2]),
        make_seq([1, 2], min_tokens=2),
        make_seq([1, 2], ignore_eos=True, stop_token_ids=(1006,)),
    )
    for seq in (early, late, ignoring):
        driver.scheduler.add(seq)
    driver.run()
    assert (early.num_generated, late.num_generated, ignoring.num_generated) == (1, 3, 5)
    assert (early.stop_reason, ignoring.stop_reason) == (None, 1006)


def test_finish_frees_pages_wherever_the_sequence_is(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(max_num_seqs=1)
    running, waiting = make_seq(range(6)), make_seq(range(6))
    driver.scheduler.add(running)
    driver.scheduler.add(waiting)
    driver.step()
    driver.scheduler.finish(waiting, FinishReason.ABORT)
    driver.scheduler.finish(running, FinishReason.ABORT)
    assert not driver.scheduler.has_work()
    assert driver.pool.num_free == driver.pool.num_pages


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.booleans()), min_size=1, max_size=12),
    num_pages=st.integers(8, 30),
    budget=st.integers(1, 40),
    max_seqs=st.integers(1, 6),
    caching=st.booleans(),
)
def test_every_sequence_gets_exactly_its_tokens(
    make_driver: MakeDriver,
    make_seq: MakeSeq,
    prompts: list[tuple[int, int, bool]],
    num_pages: int,
    budget: int,
    max_seqs: int,
    caching: bool,
) -> None:
    """Whatever the pressure: the tokens are those of an undisturbed run, and no page is lost."""

    driver = make_driver(
        num_pages=num_pages,
        max_num_batched_tokens=budget,
        max_num_seqs=max_seqs,
        enable_prefix_caching=caching,
    )
    seqs = [make_seq([int(shared) * 7] * length, max_tokens=out) for length, out, shared in prompts]
    for seq in seqs:
        driver.scheduler.add(seq)
    driver.run(limit=5000)
    for seq in seqs:
        assert seq.output_token_ids == [1000 + p for p in range(seq.num_prompt, seq.max_total_tokens)]
    assert driver.pool.num_free == num_pages
    assert all(plan.num_tokens <= budget for plan in driver.plans)
    assert all(len(plan.scheduled) <= max_seqs for plan in driver.plans)


def test_lower_priority_values_go_first_among_waiting(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(max_num_seqs=1)
    for name, priority in (("first", 0), ("late", 5), ("soon", -1), ("second", 0), ("sooner", -2)):
        seq = make_seq([1, 2, 3], 1, name)
        seq.request = replace(seq.request, priority=priority)
        driver.scheduler.add(seq)
    driver.run()
    order = [item.seq.request.request_id for plan in driver.plans for item in plan.scheduled]
    assert order == ["sooner", "soon", "first", "second", "late"]


def test_a_preempted_sequence_stays_in_front(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver()
    preempted, urgent = make_seq([1, 2], 1, "preempted"), make_seq([1, 2], 1, "urgent")
    preempted.num_preemptions = 1
    urgent.request = replace(urgent.request, priority=-9)
    driver.scheduler.add(preempted)
    driver.scheduler.add(urgent)
    assert list(driver.scheduler.waiting) == [preempted, urgent]
