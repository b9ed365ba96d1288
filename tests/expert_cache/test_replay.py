"""Events, slots, and the event-atomic cache, on sequences short enough to follow by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_cache.policies import find_policy
from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.events import Events, events_from, events_of
from expert_cache.simulation.replay import compare, gap_closed_frac, replay_belady, replay_events, usable_policies
from expert_cache.simulation.shadow import ShadowCache
from predictors.trace import RoutingTrace

from .synthetic_traces import small_traces, sticky_trace, trace_of


def listed(events: Events) -> list[tuple[int, list[int], list[int]]]:
    return [(layer, experts.tolist(), counts.tolist()) for layer, experts, counts, _ in events]


def test_events_of_a_single_stream_are_the_tokens_sorted() -> None:
    trace = trace_of([[[2, 0], [1, 3]], [[3, 2], [0, 1]]], num_experts=4)
    ones = [1, 1]
    assert listed(events_of(trace)) == [(0, [0, 2], ones), (1, [1, 3], ones), (0, [2, 3], ones), (1, [0, 1], ones)]


def test_concurrency_takes_the_union_and_starts_the_next_sequence_where_one_ends() -> None:
    """Sequences of 1, 3 and 1 tokens, two at a time: tokens 0 1, then 4 2, then 3."""
    trace = trace_of([[[0, 1]], [[1, 2]], [[2, 3]], [[0, 3]], [[0, 2]]], num_experts=4, lengths=[1, 3, 1])
    events = events_of(trace, concurrency=2)
    assert listed(events) == [(0, [0, 1, 2], [1, 2, 1]), (0, [0, 2, 3], [1, 2, 1]), (0, [0, 3], [1, 1])]
    assert events.num_tokens == 5


def test_weights_are_summed_over_the_tokens_of_a_step() -> None:
    weights = np.array([[[0.75, 0.25]], [[0.5, 0.25]]], dtype=np.float32)
    trace = RoutingTrace(np.array([[[3, 1]], [[1, 0]]]), np.array([0, 1, 2]), np.array([0]), 4, weights)
    event = next(iter(events_of(trace, concurrency=2)))
    assert event[3] is not None
    assert event[3].tolist() == [0.25, 0.75, 0.75]


@pytest.mark.parametrize("concurrency", [1, 2, 7])
def test_no_use_is_lost(concurrency: int) -> None:
    trace = sticky_trace()
    assert events_of(trace, concurrency).counts.sum() == trace.ids.size


def test_concurrency_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="concurrency is 0"):
        events_of(sticky_trace(), 0)


def run(
    sets: list[list[int]], num_slots: int, policy: str = "lru", num_experts: int = 6
) -> tuple[list[int], list[int]]:
    """Hits of each event, and what one layer's cache holds at the end."""
    cache = ShadowCache(find_policy(policy)(1, num_experts), Capacity.uniform(num_slots, 1), 1, num_experts)
    hits = [cache.event(0, np.array(s), np.ones(len(s), dtype=np.int64)) for s in sets]
    return hits, np.flatnonzero(cache.resident[0]).tolist()


def test_hits_count_against_the_state_before_the_event() -> None:
    assert run([[0, 1], [1, 2], [0, 2]], num_slots=2) == ([0, 1, 1], [0, 2])


def test_members_of_a_set_do_not_evict_one_another() -> None:
    """Access by access, LRU with 3 slots would drop 0 for 3 and miss it although the same event needs it."""
    assert run([[0, 1, 2], [0, 3, 4], [0, 3, 4]], num_slots=3) == ([0, 1, 3], [0, 3, 4])


def test_free_slots_are_filled_before_anything_is_evicted() -> None:
    assert run([[0], [1], [2], [3]], num_slots=3) == ([0, 0, 0, 0], [1, 2, 3])


def test_ties_go_to_the_lower_index() -> None:
    assert run([[1, 3, 5], [0]], num_slots=3)[1] == [0, 3, 5]


def test_a_set_larger_than_the_slots_runs_in_waves() -> None:
    """Each member without a slot beforehand misses; those worth most stay, so that a repeated scan still hits."""
    sets = [[0, 1, 2, 3]] * 3
    assert run(sets, num_slots=2) == ([0, 2, 2], [2, 3])
    assert run([[0], [0], *sets], num_slots=2, policy="lfu") == ([0, 1, 1, 2, 2], [0, 3])


@settings(max_examples=50, deadline=None)
@given(
    trace=small_traces(), num_slots=st.integers(1, 7), shared=st.booleans(), name=st.sampled_from(["lru", "affinity"])
)
def test_the_cache_holds_what_it_may(trace: RoutingTrace, num_slots: int, shared: bool, name: str) -> None:
    """Never more than the slots; the newest set is there, or as much of it as fits."""
    slots = Capacity.shared(num_slots) if shared else Capacity.uniform(num_slots, trace.num_layers)
    shape = (trace.num_layers, trace.num_experts)
    cache = ShadowCache(find_policy(name)(*shape), slots, *shape)
    for layer, experts, counts, weights in events_of(trace):
        held = cache.resident[layer, experts].sum()
        assert cache.event(layer, experts, counts, weights) == held
        sizes = [cache.resident.sum()] if shared else cache.resident.sum(axis=1)
        assert max(sizes) <= num_slots
        assert cache.resident[layer, experts].sum() == min(len(experts), num_slots)


def test_a_shared_pool_moves_slots_to_the_layer_that_needs_them() -> None:
    """Layer 0 always uses expert 0, layer 1 cycles through three: four slots are enough, two and two are not."""
    trace = trace_of([[[0], [n % 3]] for n in range(40)], num_experts=4)
    lru = find_policy("lru")
    assert replay_events(events_of(trace), lru(2, 4), Capacity.uniform(2, 2)).hits.tolist() == [39, 0]
    assert replay_events(events_of(trace), lru(2, 4), Capacity.shared(4)).hits.tolist() == [39, 37]


def test_result_figures() -> None:
    trace = trace_of([[[0, 1], [0, 1]], [[1, 2], [0, 1]]], num_experts=4)
    result = replay_events(events_of(trace), find_policy("lru")(2, 4), Capacity.uniform(2, 2))
    assert result.hits.tolist() == [1, 2]
    assert result.misses.tolist() == [3, 2]
    assert result.hit_frac == 3 / 8
    assert result.bytes_per_token(10) == 25
    assert result.union_per_slot == 1.0


def test_the_gap_runs_from_lru_to_belady() -> None:
    assert gap_closed_frac(15, 10, 20) == 0.5
    assert gap_closed_frac(8, 10, 20) == -0.2
    assert math.isnan(gap_closed_frac(10, 10, 10))
    events = events_of(sticky_trace(300))
    rows = {row.policy: row for row in compare(events, ["affinity", "lru"], Capacity.uniform(5, 3))}
    assert list(rows) == ["affinity", "lru", "belady"]
    assert rows["lru"].gap_closed_frac == 0
    assert rows["belady"].gap_closed_frac == 1
    assert 0 < rows["affinity"].gap_closed_frac < 1
    assert (rows["belady"].result.hits == replay_belady(events, Capacity.uniform(5, 3)).hits).all()


def test_what_needs_something_else_is_not_usable_alone() -> None:
    assert not {"static", "predicted"} & set(usable_policies(has_popularity=False))
    assert set(usable_policies(True)) - set(usable_policies(False)) == {"static"}


def test_slots_must_be_there() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Capacity.shared(0)
    with pytest.raises(ValueError, match="at least 1"):
        Capacity.per_layer([3, 0])
    with pytest.raises(ValueError, match="one for each of 3 layers"):
        ShadowCache(find_policy("lru")(3, 4), Capacity.per_layer([1, 1]), 3, 4)
    assert Capacity.of_frac(0.25, 3, 16).quotas == (4, 4, 4)
    assert Capacity.of_frac(0.01, 3, 16).quotas == (1, 1, 1)


def test_events_from_live_sets_match_the_trace() -> None:
    events = events_of(sticky_trace())
    live = events_from([(layer, experts) for layer, experts, _, _ in events], 3, 16)
    assert listed(live) == listed(events)
    assert live.num_tokens == events.num_tokens
