"""The bound against exhaustive search, and its windows."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_cache.policies import find_policy
from expert_cache.simulation.belady import BeladyWindow, WindowReport, belady_hits
from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.events import events_from, events_of
from expert_cache.simulation.shadow import ShadowCache
from predictors.trace import RoutingTrace

from .synthetic_traces import small_traces, sticky_trace, trace_of


def most_hits(sets: list[frozenset[int]], num_slots: int, start: frozenset[int] = frozenset()) -> int:
    """Tries everything: after each event, any `num_slots` of what was held or just fetched may be kept."""

    @cache
    def best(position: int, held: frozenset[int]) -> int:
        if position == len(sets):
            return 0
        have = held | sets[position]
        kept = itertools.combinations(sorted(have), min(num_slots, len(have)))
        return len(held & sets[position]) + max(best(position + 1, frozenset(k)) for k in kept)

    return best(0, start)


def sets_of_layer(trace: RoutingTrace, layer: int) -> list[frozenset[int]]:
    return [frozenset(token[layer].tolist()) for token in trace.ids]


def sets_of_all(trace: RoutingTrace) -> list[frozenset[int]]:
    """In order of events, with experts of different layers told apart."""
    cells = trace.ids + trace.num_experts * np.arange(trace.num_layers)[:, None]
    return [frozenset(event.tolist()) for token in cells for event in token]


@settings(max_examples=60, deadline=None)
@given(trace=small_traces(), num_slots=st.integers(1, 4))
def test_pools_per_layer_against_exhaustive_search(trace: RoutingTrace, num_slots: int) -> None:
    """Also where a set is larger than its pool."""
    hits = belady_hits(events_of(trace), Capacity.uniform(num_slots, trace.num_layers))
    assert hits.tolist() == [most_hits(sets_of_layer(trace, layer), num_slots) for layer in range(trace.num_layers)]


@settings(max_examples=40, deadline=None)
@given(trace=small_traces(), num_slots=st.integers(1, 5))
def test_a_shared_pool_against_exhaustive_search(trace: RoutingTrace, num_slots: int) -> None:
    trace = trace.head(6)
    assert belady_hits(events_of(trace), Capacity.shared(num_slots)).sum() == most_hits(sets_of_all(trace), num_slots)


@settings(max_examples=40, deadline=None)
@given(trace=small_traces(), num_slots=st.integers(1, 4), data=st.data())
def test_a_start_that_is_not_empty(trace: RoutingTrace, num_slots: int, data: st.DataObject) -> None:
    held = data.draw(st.frozensets(st.integers(0, trace.num_experts - 1), max_size=num_slots))
    trace = RoutingTrace(trace.ids[:, :1], trace.seq_offsets, trace.layer_ids[:1], trace.num_experts)
    resident = np.isin(np.arange(trace.num_experts), list(held))[None]
    best = most_hits(sets_of_layer(trace, 0), num_slots, held)
    for slots in (Capacity.uniform(num_slots, 1), Capacity.shared(num_slots)):
        assert belady_hits(events_of(trace), slots, resident).sum() == best


def test_quotas_bound_their_own_layer() -> None:
    events = events_of(sticky_trace())
    hits = belady_hits(events, Capacity.per_layer([3, 5, 8]))
    for layer, num_slots in enumerate((3, 5, 8)):
        assert hits[layer] == belady_hits(events, Capacity.uniform(num_slots, 3))[layer]


def test_all_slots_leave_only_first_uses_to_miss() -> None:
    trace = trace_of([[[0, 1]], [[1, 2]], [[0, 2]]], num_experts=3)
    assert belady_hits(events_of(trace), Capacity.uniform(3, 1)).tolist() == [3]


def test_no_events_no_hits() -> None:
    empty = events_from([], num_layers=2, num_experts=4)
    for slots in (Capacity.uniform(2, 2), Capacity.shared(4)):
        assert belady_hits(empty, slots).tolist() == [0, 0]


@pytest.mark.parametrize("shared", [False, True])
def test_windows_add_up_to_the_events_and_bound_the_cache(shared: bool) -> None:
    events = events_of(sticky_trace(200))
    slots = Capacity.shared(15) if shared else Capacity.uniform(5, 3)
    cache_ = ShadowCache(find_policy("lru")(3, 16), slots, 3, 16)
    window = BeladyWindow(slots, 3, 16, num_events=150)
    reports: list[WindowReport] = []
    for layer, experts, counts, weights in events:
        window.add(layer, experts, cache_.event(layer, experts, counts, weights), cache_.resident)
        if window.last is not None and window.last not in reports:
            reports.append(window.last)
    assert [r.uses for r in reports] == [450] * 4
    assert sum(r.hits for r in reports) == sum(cache_.hits)
    assert all(r.hits < r.belady_hits <= r.uses for r in reports)
    assert all(0 < r.avoidable_frac <= 1 for r in reports)
    assert window.report() == WindowReport(0, 0, 0)
    assert window.report().avoidable_frac == 0
