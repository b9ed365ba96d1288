"""What every policy must satisfy, from inside or outside, and what each of ours is for."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_cache.policies import find_policy, policy, policy_names
from expert_cache.policies.policy import Policy
from expert_cache.simulation.belady import belady_hits
from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.events import Events, events_of
from expert_cache.simulation.replay import replay_events
from expert_cache.simulation.shadow import ShadowCache
from predictors.trace import RoutingTrace

from ..laws import laws_of
from .synthetic_traces import small_traces, sticky_trace

POLICIES = policy_names()
ONLINE = [name for name in POLICIES if find_policy(name).needs != "popularity"]
L, E = 3, 16
law = laws_of(policy)
every_policy = pytest.mark.parametrize("name", POLICIES)


def make(name: str, num_layers: int = L, num_experts: int = E, seed: int = 1) -> Policy:
    popularity = np.random.default_rng(seed).random((num_layers, num_experts))
    return find_policy(name)(num_layers, num_experts, popularity)


def feed(policy: Policy, events: Events, num_events: int | None = None) -> Policy:
    for event in list(events)[:num_events]:
        policy.record(*event)
    return policy


def test_the_folder_is_the_list() -> None:
    assert {"affinity", "lfru", "lfu", "lru", "predicted", "static"} <= set(POLICIES)
    assert "policy" not in POLICIES
    with pytest.raises(ValueError, match="'mru' is not one of affinity, "):
        find_policy("mru")


@every_policy
@law(1)
def test_values_are_finite_from_the_start(name: str) -> None:
    """Before any event, after one layer's event, and after many."""
    events = events_of(sticky_trace())
    for num_events in (0, 1, L * 50):
        policy = feed(make(name), events, num_events)
        together = policy.keep_values_all()
        assert together.shape == (L, E)
        assert together.dtype == np.float64
        assert np.isfinite(together).all()
        for layer in range(L):
            np.testing.assert_array_equal(np.argsort(policy.keep_values(layer)), np.argsort(together[layer]))


@every_policy
@law(2)
def test_a_layer_without_events_does_not_disturb_the_others(name: str) -> None:
    policy, alone = make(name), make(name)
    for event in events_of(sticky_trace()):
        layer = event[0]
        if layer != 1:
            policy.record(*event)
        if layer == 0:
            alone.record(*event)
    assert np.isfinite(policy.keep_values(1)).all()
    np.testing.assert_array_equal(np.argsort(policy.keep_values(0)), np.argsort(alone.keep_values(0)))


@every_policy
@law(3)
def test_an_event_without_experts_is_no_mistake(name: str) -> None:
    policy = feed(make(name), events_of(sticky_trace()))
    none = np.zeros(0, dtype=np.int64)
    policy.record(1, none, none, None)
    assert np.isfinite(policy.keep_values(1)).all()


@every_policy
@law(4)
def test_no_policy_peeks(name: str) -> None:
    """Hits before the cut are the same whether or not the trace goes on."""
    trace = sticky_trace()
    whole, cut = events_of(trace), events_of(trace.head(40))
    caches = [ShadowCache(make(name), Capacity.uniform(6, L), L, E) for _ in range(2)]
    hits = [[cache.event(*event) for event in events] for cache, events in zip(caches, (whole, cut), strict=True)]
    assert hits[0][: cut.num_events] == hits[1]


@every_policy
@law(5)
def test_asking_for_values_changes_nothing(name: str) -> None:
    events = events_of(sticky_trace())
    asked = make(name)
    for event in events:
        asked.record(*event)
        asked.keep_values(event[0])
        asked.keep_values_all()
    np.testing.assert_allclose(asked.keep_values_all(), feed(make(name), events).keep_values_all(), rtol=1e-12)


@every_policy
@law(3)
def test_weights_may_be_missing(name: str) -> None:
    policy = make(name)
    for layer, experts, counts, _ in events_of(sticky_trace()):
        policy.record(layer, experts, counts, None)
    assert np.isfinite(policy.keep_values_all()).all()


@every_policy
@law(6)
def test_names_of_experts_mean_nothing(name: str) -> None:
    """Renaming the experts renames the values."""
    trace, rename = sticky_trace(), np.random.default_rng(3).permutation(E)
    renamed = RoutingTrace(rename[trace.ids], trace.seq_offsets, trace.layer_ids, E, trace.weights)
    popularity = np.random.default_rng(1).random((L, E))
    renamed_popularity = np.empty_like(popularity)
    renamed_popularity[:, rename] = popularity
    values = feed(find_policy(name)(L, E, popularity), events_of(trace)).keep_values_all()
    again = feed(find_policy(name)(L, E, renamed_popularity), events_of(renamed)).keep_values_all()
    np.testing.assert_allclose(again[:, rename], values, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(trace=small_traces(), num_slots=st.integers(1, 6), shared=st.booleans(), concurrency=st.integers(1, 3))
def test_no_policy_passes_belady(trace: RoutingTrace, num_slots: int, shared: bool, concurrency: int) -> None:
    events = events_of(trace, concurrency)
    slots = Capacity.shared(num_slots) if shared else Capacity.uniform(num_slots, trace.num_layers)
    bound = belady_hits(events, slots)
    for name in POLICIES:
        result = replay_events(events, make(name, trace.num_layers, trace.num_experts), slots)
        assert result.hits.sum() <= bound.sum(), name
        assert shared or (result.hits <= bound).all(), name
        assert ((result.hits + result.misses) == events.uses_by_layer()).all()


@pytest.mark.parametrize("name", ONLINE)
@law(7)
def test_an_online_policy_beats_evicting_at_random(name: str) -> None:
    """On routing with popular and sticky experts, which all of them claim to use."""
    events = events_of(sticky_trace(400))
    slots = Capacity.uniform(6, L)

    class Random:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)

        def record(self, *event: object) -> None: ...
        def keep_values(self, layer: int) -> np.ndarray:
            return self.rng.random(E)

        def keep_values_all(self) -> np.ndarray:
            return self.rng.random((L, E))

    chance = replay_events(events, Random(), slots).hit_frac
    assert replay_events(events, make(name), slots).hit_frac > chance + 0.02


@every_policy
@law(8)
def test_an_event_is_cheap(name: str) -> None:
    """CPU time at E = 64, a batch's union; the budget is 40 us, the bound has room for a busy machine."""
    policy, experts = make(name, 1, 64), np.arange(0, 64, 4)
    best_s = float("inf")
    for _ in range(20):
        start = time.thread_time()
        for _ in range(50):
            policy.record(0, experts, np.ones(16, dtype=np.int64), None)
            policy.keep_values(0)
        best_s = min(best_s, (time.thread_time() - start) / 50)
    assert best_s < 200e-6


def values_after(name: str, sets: list[list[int]], num_experts: int = 4) -> list[float]:
    policy = find_policy(name)(1, num_experts)
    for experts in sets:
        policy.record(0, np.array(experts), np.ones(len(experts), dtype=np.int64), None)
    return [float(v) for v in policy.keep_values(0)]


def test_lru_orders_by_last_use() -> None:
    assert np.argsort(values_after("lru", [[1], [0, 2], [3], [1]])).tolist() == [0, 2, 3, 1]


def test_lfu_counts_steps() -> None:
    assert values_after("lfu", [[0, 1], [1], [1, 3]]) == [1, 3, 0, 1]


def test_lfru_divides_by_age() -> None:
    assert values_after("lfru", [[0, 1], [1], [1, 3], [0]]) == [2 / 1, 3 / 2, 0, 1 / 2]


def test_static_keeps_its_ranking() -> None:
    policy = feed(make("static", seed=5), events_of(sticky_trace()))
    np.testing.assert_array_equal(policy.keep_values_all(), np.random.default_rng(5).random((L, E)))


def test_affinity_learns_what_follows_what() -> None:
    """0 is always followed by 1, and 2 by 3, equally often: after 0, expert 1 is worth more than 3."""
    values = values_after("affinity", [[0], [1], [4], [2], [3], [5]] * 20 + [[0]], num_experts=6)
    assert values[1] > values[3]
    values = values_after("affinity", [[0], [1], [4], [2], [3], [5]] * 20 + [[0], [1], [4], [2]], num_experts=6)
    assert values[3] > values[1]


def test_affinity_forgets_a_workload_that_ended() -> None:
    """A long run on one pair, then half as long on another: the newer wins, through the halving."""
    values = values_after("affinity", [[0], [1]] * 3000 + [[2], [3]] * 1500, num_experts=4)
    assert min(values[2], values[3]) > max(values[0], values[1])


def test_predicted_is_lfru_until_a_forecast_comes() -> None:
    events = events_of(sticky_trace())
    predicted, lfru = feed(make("predicted"), events), feed(make("lfru"), events)
    np.testing.assert_array_equal(predicted.keep_values_all(), lfru.keep_values_all())
    forecast = np.zeros(E)
    forecast[5] = 2.0
    predicted.set_forecast(1, forecast)  # type: ignore[attr-defined]
    assert predicted.keep_values(1).argmax() == 5
    np.testing.assert_array_equal(predicted.keep_values(0), lfru.keep_values(0))
    others = np.delete(np.arange(E), 5)
    ranks = [np.argsort(policy.keep_values(1)[others]) for policy in (predicted, lfru)]
    np.testing.assert_array_equal(ranks[0], ranks[1])
    assert predicted.keep_values_all().argmax() == E + 5
    predicted.set_forecast(1, None)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(predicted.keep_values_all(), lfru.keep_values_all())
