"""Quotas: LRU's hit curves against replay, and the split against trying every split."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from expert_cache.policies import find_policy
from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.events import events_of
from expert_cache.simulation.quotas import best_split, lru_hit_curves, quota_slots
from expert_cache.simulation.replay import replay_events

from .synthetic_traces import sticky_trace, trace_of


def test_curves_are_what_replay_counts() -> None:
    events = events_of(sticky_trace(top_k=3))
    curves = lru_hit_curves(events)
    assert curves.shape == (3, 17)
    for num_slots in (3, 4, 9, 16):
        replayed = replay_events(events, find_policy("lru")(3, 16), Capacity.uniform(num_slots, 3))
        assert replayed.hits.tolist() == curves[:, num_slots].tolist()


def test_the_split_is_the_best_of_all_splits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        hits = np.concatenate([np.zeros((3, 1), dtype=np.int64), rng.integers(0, 20, (3, 5)).cumsum(axis=1)], axis=1)
        for total, least in ((3, 1), (7, 1), (8, 2), (15, 1)):
            splits = [s for s in itertools.product(range(least, 6), repeat=3) if sum(s) == total]
            best = max(sum(hits[layer, n] for layer, n in enumerate(s)) for s in splits)
            quotas = best_split(hits, total, least)
            assert tuple(quotas) in splits
            assert sum(hits[layer, n] for layer, n in enumerate(quotas)) == best


def test_quotas_follow_need_and_keep_to_the_bounds() -> None:
    """Layer 0 needs two experts, layer 1 all six in turn."""
    trace = trace_of([[[n % 2], [n % 6]] for n in range(60)], num_experts=6)
    assert quota_slots(events_of(trace), total=8).quotas == (2, 6)
    assert min(quota_slots(events_of(trace), total=8, min_slots=3).quotas or ()) >= 3
    assert quota_slots(events_of(trace), total=12).quotas == (6, 6)


@pytest.mark.parametrize(("total", "least"), [(2, 1), (8, 3), (49, 1)])
def test_a_total_that_cannot_be_given_out(total: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"total is {total}"):
        quota_slots(events_of(sticky_trace()), total, least)


def test_quotas_do_not_lose_lru_hits_on_their_own_trace() -> None:
    events = events_of(sticky_trace(300))
    uniform, quotas = Capacity.uniform(6, 3), quota_slots(events, 18, min_slots=3)
    assert sum(quotas.quotas or ()) == 18
    hits = [replay_events(events, find_policy("lru")(3, 16), slots).hits.sum() for slots in (uniform, quotas)]
    assert hits[1] >= hits[0]
