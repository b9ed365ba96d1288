"""The audit of prefetching: on where it is faster, off where not, layer by layer, and probes ever further apart."""

from __future__ import annotations

import pytest

from expert_cache.prefetch.advisors import Advice
from expert_cache.prefetch.audit import (
    BLOCK_STEPS,
    FEWEST_EXPERTS,
    FIRST_HOLD_STEPS,
    PROBE_BLOCKS,
    PrefetchAudit,
)
from expert_cache.report import CacheCounters
from predictors.shape import MoELayer

EXPERT_BYTES = 1000
PROBE_STEPS = BLOCK_STEPS * PROBE_BLOCKS


class Bench:
    """An audit whose steps take as long as they are told to."""

    def __init__(self, num_layers: int = 2) -> None:
        self.now = 0.0
        self.is_useful = True
        self.counters = CacheCounters(num_layers)
        self.audit = PrefetchAudit(self.counters, EXPERT_BYTES, lambda: self.now)

    def step(self, with_s: float, without_s: float, tokens: int = 1) -> bool:
        prefetching = self.audit.is_prefetching
        self.audit.begin(tokens)
        self.now += with_s if prefetching else without_s
        self.counters.prefetch_hits[0] += prefetching and self.is_useful
        self.audit.end()
        return prefetching

    def run(self, steps: int, with_s: float, without_s: float) -> int:
        """How many of the steps prefetched."""
        return sum(self.step(with_s, without_s) for _ in range(steps))


def test_a_probe_tries_both_in_turn() -> None:
    bench = Bench()
    tried = [bench.step(1.0, 1.0) for _ in range(PROBE_STEPS)]
    assert tried == ([False] * BLOCK_STEPS + [True] * BLOCK_STEPS) * (PROBE_BLOCKS // 2)


@pytest.mark.parametrize(("with_s", "stays_on"), [(0.8, True), (0.99, False), (1.0, False), (1.5, False)])
def test_it_stays_on_only_if_it_is_clearly_faster(with_s: float, stays_on: bool) -> None:
    bench = Bench()
    bench.run(PROBE_STEPS, with_s, 1.0)
    assert bench.audit.last_ratio == pytest.approx(with_s)
    assert bench.run(FIRST_HOLD_STEPS, with_s, 1.0) == (FIRST_HOLD_STEPS if stays_on else 0)
    assert bench.counters.prefetch_on.all() == bench.audit.is_prefetching


def test_chance_does_not_turn_it_on() -> None:
    """A busy machine: the steps with it were a little faster at the median, but not most of them."""
    bench = Bench()
    bench.run(BLOCK_STEPS, 1.0, 1.0)
    for step in range(PROBE_STEPS - BLOCK_STEPS):
        bench.step(0.9 if step % 2 else 1.5, 1.0)
    assert not bench.audit.is_prefetching


def test_what_brings_nothing_is_not_turned_on() -> None:
    bench = Bench()
    bench.is_useful = False
    bench.run(PROBE_STEPS, 0.5, 1.0)
    assert not bench.audit.is_prefetching


def test_what_is_on_stays_on_unless_it_is_slower() -> None:
    bench = Bench()
    bench.run(PROBE_STEPS + FIRST_HOLD_STEPS, 0.8, 1.0)
    bench.run(PROBE_STEPS, 0.99, 1.0)
    assert bench.run(2 * FIRST_HOLD_STEPS, 0.99, 1.0) == 2 * FIRST_HOLD_STEPS
    bench.run(PROBE_STEPS, 1.01, 1.0)
    assert bench.run(FIRST_HOLD_STEPS, 1.01, 1.0) == 0


def test_prefetching_that_always_slows_down_by_a_fifth_costs_less_than_two_percent() -> None:
    bench = Bench()
    steps = 1500
    bench.run(steps, 1.2, 1.0)
    assert bench.now / steps < 1.01
    assert bench.run(20000, 0.7, 1.0) > 15000  # and once it pays, it comes back


def test_steps_are_compared_with_steps_of_their_size() -> None:
    """Large steps with, small ones without: that says nothing."""
    bench = Bench()
    for _ in range(PROBE_STEPS):
        size = 64 if bench.audit.is_prefetching else 1
        bench.step(10.0, 1.0, size)
    assert bench.audit.last_ratio is None
    assert not bench.audit.is_prefetching


def test_a_layer_that_wastes_is_left_out_and_tried_again() -> None:
    bench = Bench()
    advice = [Advice(MoELayer(0), (1,), (1.0,)), Advice(MoELayer(1), (2,), (1.0,))]
    bench.run(2 * BLOCK_STEPS - 1, 0.5, 1.0)
    bench.counters.prefetch_hits[0] += FEWEST_EXPERTS
    bench.counters.wasted_bytes[1] += FEWEST_EXPERTS * EXPERT_BYTES
    bench.step(0.5, 1.0)
    assert [a.layer for a in bench.audit.allowed(advice)] == [0]
    assert bench.counters.prefetch_on.tolist() == [False, False]  # the next block is without
    bench.run(PROBE_STEPS - 2 * BLOCK_STEPS, 0.5, 1.0)
    assert bench.counters.prefetch_on.tolist() == [True, False]
    bench.run(FIRST_HOLD_STEPS, 0.5, 1.0)
    assert len(bench.audit.allowed(advice)) == 2
