"""Slots are written and read in an order that holds on two streams, checked with the streams' clocks and no GPU."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from expert_cache.storage.copy_stream import Mark, SlotOrder
from expert_cache.storage.transit import FEWEST_BUFFERS, Transit

CPU = torch.device("cpu")
Clock = dict[str, int]
"""Stream -> how much of its work comes before."""


@dataclass
class Event:
    clock: Clock
    is_done: bool = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True


@dataclass
class Clocks:
    """A CopyStream that runs nothing and knows what comes before what."""

    now: dict[str, Clock] = field(default_factory=lambda: {"copies": {"copies": 0}, "kernels": {"kernels": 0}})
    current: str = "kernels"
    events: list[Event] = field(default_factory=list)

    def issue(self) -> tuple[str, int]:
        """Some work on the stream that is current: its stream and its number there."""
        self.now[self.current][self.current] += 1
        return self.current, self.now[self.current][self.current]

    def comes_before(self, work: tuple[str, int]) -> bool:
        """What is issued next waits for this work."""
        return self.now[self.current].get(work[0], 0) >= work[1]

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        before, self.current = self.current, "copies"
        yield
        self.current = before

    def copies_so_far(self) -> Mark:
        return self._mark("copies")

    def kernels_so_far(self) -> Mark:
        return self._mark("kernels")

    def copies_wait(self, mark: Mark) -> None:
        self._wait("copies", mark)

    def kernels_wait(self, mark: Mark) -> None:
        self._wait("kernels", mark)

    def _mark(self, stream: str) -> Event:
        self.events.append(Event(dict(self.now[stream])))
        return self.events[-1]

    def _wait(self, stream: str, mark: Mark) -> None:
        assert isinstance(mark, Event)
        for other, number in mark.clock.items():
            self.now[stream][other] = max(self.now[stream].get(other, 0), number)


def test_every_read_follows_its_write_and_every_write_the_last_read() -> None:
    clocks = Clocks()
    order = SlotOrder(clocks)
    draw = random.Random(1)
    written: dict[int, tuple[str, int]] = {}
    read: dict[int, tuple[str, int]] = {}
    for _ in range(300):
        if draw.random() < 0.5 or not written:
            slot = draw.randrange(6)
            with order.writing(slot):
                assert clocks.current == "copies"
                assert slot not in read or clocks.comes_before(read[slot])
                written[slot] = clocks.issue()
        else:
            slots = draw.sample(sorted(written), draw.randint(1, len(written)))
            with order.reading(slots):
                assert clocks.current == "kernels"
                assert all(clocks.comes_before(written[slot]) for slot in slots)
                read |= dict.fromkeys(slots, clocks.issue())


def test_what_is_not_read_stalls_nothing() -> None:
    """A prefetch runs beside kernels of other experts: neither waits for the other."""
    clocks = Clocks()
    order = SlotOrder(clocks)
    with order.writing(0):
        clocks.issue()
    with order.reading([0]):
        kernel = clocks.issue()
    with order.writing(1):
        assert not clocks.comes_before(kernel)
        prefetch = clocks.issue()
    with order.reading([0]):
        assert not clocks.comes_before(prefetch)


def test_one_stream_needs_no_order() -> None:
    order = SlotOrder()
    with order.writing(0), order.reading([0]):
        pass


def transit(clocks: Clocks, num_slots: int = 10) -> tuple[Transit, list[torch.Tensor]]:
    """An arena of 4 KiB slots, and its buffers."""
    buffers: list[torch.Tensor] = []

    def allocate(num_bytes: int) -> torch.Tensor:
        buffers.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return buffers[-1]

    return Transit(num_slots, 4096, CPU, clocks, allocate), buffers


def test_bytes_pass_through_a_buffer_that_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expert_cache.storage.transit.PINNED_BYTES", 0)
    clocks = Clocks()
    arena, buffers = transit(clocks)
    assert len(buffers) == FEWEST_BUFFERS
    for number in range(3 * FEWEST_BUFFERS):
        arena.landing(number % 10)[:] = bytes([number]) * 4096
        arena.landed(number % 10)
        assert clocks.current == "kernels"
        assert arena.tensor(number % 10).unique().tolist() == [number]
    assert sum(event.is_done for event in clocks.events) == 2 * FEWEST_BUFFERS  # a busy buffer is waited for


def test_more_reads_than_buffers_go_through_pageable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expert_cache.storage.transit.PINNED_BYTES", 0)
    arena, buffers = transit(Clocks())
    for slot in range(FEWEST_BUFFERS + 1):
        arena.landing(slot)[:] = bytes([slot]) * 4096
    assert [int(buffer[0]) for buffer in reversed(buffers)] == list(range(FEWEST_BUFFERS))
    for slot in range(FEWEST_BUFFERS + 1):
        arena.dropped(slot)
    assert arena.landing(0).obj is not None
    assert len(buffers) == FEWEST_BUFFERS


def test_small_experts_have_a_buffer_each() -> None:
    assert len(transit(Clocks(), num_slots=60)[1]) == 60
