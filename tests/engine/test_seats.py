"""Each running sequence has a seat of its own; one that waits has none."""

from __future__ import annotations

import pytest

from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.seats import NO_SEAT, Seats

from .driving import SchedulerDriver, make_seq


def test_running_sequences_have_different_seats_and_give_them_back() -> None:
    driver = SchedulerDriver(max_num_seqs=2)
    seqs = [make_seq([i, i + 1], request_id=str(i)) for i in range(3)]
    for seq in seqs:
        driver.scheduler.add(seq)
    driver.step()
    assert {seqs[0].seat, seqs[1].seat} == {0, 1}
    assert seqs[2].seat == NO_SEAT
    left = seqs[0].seat
    driver.scheduler.finish(seqs[0], FinishReason.ABORT)
    assert seqs[0].seat == NO_SEAT
    driver.step()
    assert seqs[2].seat == left


def test_a_preempted_sequence_loses_its_seat() -> None:
    driver = SchedulerDriver(num_pages=5, page_size=2)
    seqs = [make_seq([1, 2, 3, 4], request_id=str(i)) for i in range(2)]
    for seq in seqs:
        driver.scheduler.add(seq)
    plan = driver.step()
    while not plan.preempted:
        plan = driver.step()
    assert plan.preempted == (seqs[1],)
    assert seqs[1].seat == NO_SEAT
    driver.scheduler.seats.check_integrity(seq.seat for seq in seqs)


def test_lost_and_shared_seats_are_found() -> None:
    seats = Seats(2)
    taken = seats.take()
    seats.check_integrity([taken, NO_SEAT])
    with pytest.raises(AssertionError):
        seats.check_integrity([])
    with pytest.raises(AssertionError):
        seats.check_integrity([taken, taken])
