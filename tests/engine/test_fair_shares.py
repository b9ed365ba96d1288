"""Clients share the steps: the one that was served least goes first, and one that does not read costs nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moe_serve.scheduling import fair_shares
from moe_serve.scheduling.fair_shares import FairShares
from moe_serve.scheduling.sequence import Request, SamplingParams
from moe_serve.scheduling.sequence import Sequence as Seq

from .driving import SchedulerDriver


def of_client(client: str, prompt: Sequence[int], max_tokens: int = 4, priority: int = 0) -> Seq:
    request = Request("r", tuple(prompt), SamplingParams(max_tokens=max_tokens), client=client, priority=priority)
    return Seq(request, 0, list(prompt), len(prompt) + max_tokens)


def endings(driver: SchedulerDriver, sequences: list[Seq]) -> list[int]:
    """Positions in `sequences` in the order in which they end."""
    order: list[int] = []
    while driver.scheduler.has_work():
        driver.step()
        order += [i for i, seq in enumerate(sequences) if seq.is_finished and i not in order]
    return order


def test_a_client_with_one_request_does_not_wait_for_all_of_another() -> None:
    driver = SchedulerDriver(max_num_seqs=1)
    sequences = [*(of_client("many", range(10 * i, 10 * i + 4)) for i in range(5)), of_client("one", range(900, 904))]
    for seq in sequences:
        driver.scheduler.add(seq)
    assert endings(driver, sequences) == [0, 5, 1, 2, 3, 4]


def test_two_clients_that_want_more_than_there_is_get_the_same() -> None:
    driver = SchedulerDriver(max_num_seqs=1, num_pages=256)
    sequences = [
        *(of_client("long", range(100 * i, 100 * i + 8), max_tokens=16) for i in range(4)),
        *(of_client("short", range(5000 + 100 * i, 5000 + 100 * i + 4), max_tokens=4) for i in range(12)),
    ]
    for seq in sequences:
        driver.scheduler.add(seq)
    kinds = ["L" if i < 4 else "s" for i in endings(driver, sequences)]
    assert "".join(kinds) == "LssssLsssLsssLss"  # 23 computed tokens each, and 7


def test_a_long_prompt_leaves_room_for_anothers_short_one() -> None:
    driver = SchedulerDriver(max_num_batched_tokens=8, num_pages=256)
    long, short = of_client("a", range(200)), of_client("b", range(1000, 1004))
    driver.scheduler.add(long)
    driver.step()
    driver.scheduler.add(short)
    plan = driver.step()
    assert [(item.seq, item.count) for item in plan.scheduled] == [(short, 4), (long, 4)]


def test_of_one_client_a_long_prompt_goes_first_as_it_came() -> None:
    driver = SchedulerDriver(max_num_batched_tokens=8, num_pages=256)
    long, short = of_client("a", range(200)), of_client("a", range(1000, 1004))
    driver.scheduler.add(long)
    driver.step()
    driver.scheduler.add(short)
    assert [(item.seq, item.count) for item in driver.step().scheduled] == [(long, 8)]


def test_priority_comes_before_shares() -> None:
    driver = SchedulerDriver(max_num_seqs=1)
    first, poor, urgent = of_client("a", [1]), of_client("b", [2]), of_client("a", [3], priority=-1)
    for seq in (first, poor, urgent):
        driver.scheduler.add(seq)
    assert endings(driver, [first, poor, urgent]) == [2, 1, 0]


def test_a_paused_sequence_is_not_computed_until_it_goes_on() -> None:
    driver = SchedulerDriver()
    paused, other = of_client("a", [1, 2]), of_client("a", [3, 4], max_tokens=8)
    for seq in (paused, other):
        driver.scheduler.add(seq)
    driver.step()
    paused.is_paused = True
    assert [item.seq for item in driver.step().scheduled] == [other]
    driver.run()
    assert other.is_finished
    assert not paused.is_finished
    assert not driver.scheduler.has_work()
    paused.is_paused = False
    driver.run()
    assert paused.output_token_ids == [1002, 1003, 1004, 1005]


def test_paused_sequences_give_their_places_and_pages_to_those_that_wait() -> None:
    driver = SchedulerDriver(max_num_seqs=2, num_pages=4)
    slow = [of_client("a", range(10 * i, 10 * i + 6), max_tokens=2) for i in range(2)]
    for seq in slow:
        driver.scheduler.add(seq)
    driver.step()
    for seq in slow:
        seq.is_paused = True
    other = of_client("a", range(100, 110), max_tokens=4)
    driver.scheduler.add(other)
    driver.run()
    assert other.is_finished
    for seq in slow:
        seq.is_paused = False
    driver.run()
    assert [seq.output_token_ids for seq in slow] == [[1006, 1007], [1006, 1007]]


def test_who_leaves_for_a_moment_keeps_its_debt_and_who_is_new_saves_nothing_up() -> None:
    shares = FairShares()
    shares.enter("a")
    shares.charge("a", 100)
    shares.enter("b")
    assert shares.served("b") == 100
    shares.charge("b", 10)
    shares.leave("b")
    shares.enter("b")
    assert shares.served("b") == 110


def test_counters_of_absent_clients_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_shares, "MOST_ABSENT", 3)
    shares = FairShares()
    shares.enter("present")
    for i in range(10):
        shares.enter(str(i))
        shares.leave(str(i))
    assert len(shares._served) == 4
    shares.charge("present", 1)
