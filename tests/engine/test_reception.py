"""Reception without an engine: what counts as waiting, and who is told when more come than can be served."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from moe_serve.config import EngineConfig
from moe_serve.engine.request_queue import MAX_UNREAD, RESUME_UNREAD, RequestQueue
from moe_serve.errors import InvalidRequestError, OverloadedError, TooManyRequestsError
from moe_serve.scheduling.sequence import Request, SampleOutput, SamplingParams


class Desk:
    """A Reception, and who was to be given up so far."""

    def __init__(self, **settings: Any) -> None:
        self.given_up: list[str] = []
        self.paused: list[tuple[str, bool]] = []
        self.reception = RequestQueue(
            EngineConfig.of(**settings),
            lambda request_id, reason: self.given_up.append(request_id),
            lambda request_id, is_paused: self.paused.append((request_id, is_paused)),
        )

    def enter(self, request_id: str, priority: int = 0, client: str = "") -> Any:
        return self.reception.enter(Request(request_id, (1, 2), SamplingParams(), priority=priority, client=client))

    def give_output(self, request_id: str) -> None:
        self.reception.deliver([SampleOutput(request_id, 0, "x", (1,), (), None, None, 2, 0, 1)])


def test_who_has_a_seat_or_finds_one_free_is_not_queued() -> None:
    async def run() -> None:
        desk = Desk(max_num_seqs=2)
        first, *_ = (desk.enter(name) for name in "abc")
        assert desk.reception.num_queued == 1
        desk.give_output("a")
        assert (desk.reception.num_in_flight, desk.reception.num_queued) == (3, 1)
        desk.reception.leave(first)
        assert (desk.reception.num_in_flight, desk.reception.num_queued) == (2, 0)

    asyncio.run(run())


def test_an_id_is_in_flight_once() -> None:
    async def run() -> None:
        desk = Desk()
        first = desk.enter("a")
        with pytest.raises(InvalidRequestError, match="already running"):
            desk.enter("a")
        desk.reception.leave(first)
        desk.enter("a")

    asyncio.run(run())


def test_when_an_overload_begins_all_but_the_first_in_turn_are_given_up_once() -> None:
    async def run() -> None:
        desk = Desk(max_num_seqs=1, max_num_queued_reqs=3, max_queue_wait_s=60.0)
        desk.enter("running")
        desk.give_output("running")
        for name, priority in (("a", 0), ("b", -1), ("c", 0)):
            desk.enter(name, priority)
        for name in "de":
            with pytest.raises(OverloadedError):
                desk.enter(name)
            assert desk.given_up == ["a", "c"]
        assert desk.reception.request_ids == ["running", "a", "b", "c"]

    asyncio.run(run())


def test_who_waits_for_too_long_is_given_up_and_who_has_left_is_not() -> None:
    async def run() -> None:
        desk = Desk(max_queue_wait_s=0.01)
        gone = desk.enter("gone")
        desk.enter("waiting")
        desk.reception.leave(gone)
        await asyncio.sleep(0.05)
        assert desk.given_up == ["waiting"]

    asyncio.run(run())


def test_one_client_has_at_most_so_many_in_flight() -> None:
    async def run() -> None:
        desk = Desk(max_concurrent_per_client=2)
        first, _ = desk.enter("a", client="x"), desk.enter("b", client="x")
        with pytest.raises(TooManyRequestsError, match="2 requests in flight") as refused:
            desk.enter("c", client="x")
        assert refused.value.retry_after_s >= 1
        desk.enter("d", client="y")
        desk.reception.leave(first)
        desk.enter("c", client="x")

    asyncio.run(run())


def test_a_request_whose_client_does_not_read_is_paused_until_it_has_read() -> None:
    async def run() -> None:
        desk = Desk()
        pending = desk.enter("a")
        for _ in range(MAX_UNREAD + 5):
            desk.give_output("a")
        assert desk.paused == [("a", True)]
        while len(pending.mailbox) > RESUME_UNREAD:
            assert desk.paused == [("a", True)]
            await pending.mailbox.get()
            desk.reception.note_read(pending)
        assert desk.paused == [("a", True), ("a", False)]

    asyncio.run(run())
