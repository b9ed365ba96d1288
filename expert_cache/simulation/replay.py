"""Replay: a trace through caches, to judge policies and predictors without a device, beside LRU and the bound.

The cache is `shadow.py`'s, the bound `belady.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expert_cache.policies import find_policy, policy_names
from expert_cache.policies.policy import Policy, Values
from expert_cache.policies.predicted import Predicted
from expert_cache.simulation.belady import belady_hits
from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.events import Events
from expert_cache.simulation.shadow import ShadowCache
from predictors.evaluation import run_streams, show
from predictors.predictor import Foresight, Predictor
from predictors.trace import RoutingTrace

BOUND = "belady"
REFERENCE = "lru"


@dataclass(frozen=True, eq=False)
class ReplayResult:
    """Expert-level counts: a use is one expert needed in one step, by however many tokens."""

    hits: npt.NDArray[np.int64]
    """[L]."""
    misses: npt.NDArray[np.int64]
    """[L]."""
    num_tokens: int
    num_events: int
    total_slots: int

    @property
    def hit_frac(self) -> float:
        return float(self.hits.sum() / (self.hits.sum() + self.misses.sum()))

    @property
    def union_per_slot(self) -> float:
        """Experts that a layer's step needs, over the slots a layer has on average; above 1 every step overflows."""
        mean_union = (self.hits.sum() + self.misses.sum()) / self.num_events
        return float(mean_union * len(self.hits) / self.total_slots)

    def bytes_per_token(self, expert_bytes: float) -> float:
        """What has to be copied for each token when every miss is."""
        return float(self.misses.sum() * expert_bytes / self.num_tokens)


def replay_events(events: Events, policy: Policy, capacity: Capacity, bypass: bool = False) -> ReplayResult:
    """All events through a `ShadowCache` that starts empty."""
    cache = ShadowCache(policy, capacity, events.num_layers, events.num_experts, bypass)
    for layer, experts, counts, weights in events:
        cache.event(layer, experts, counts, weights)
    return _result(events, np.array(cache.hits), capacity)


def replay_belady(events: Events, capacity: Capacity) -> ReplayResult:
    """The bound: no policy misses less."""
    return _result(events, belady_hits(events, capacity), capacity)


def gap_closed_frac(hits: float, lru_hits: float, belady_hits: float) -> float:
    """How far a policy gets from LRU (0) to Belady (1); nan where there is nothing between them."""
    return float((hits - lru_hits) / (belady_hits - lru_hits)) if belady_hits > lru_hits else float("nan")


def replay_forecasts(trace: RoutingTrace, predictor: Predictor, capacity: Capacity) -> ReplayResult:
    """The trace through a cache that keeps what `predictor` expects. TypeError where it has no `upcoming`.

    One sequence at a time. Before each layer's event the policy `predicted` is given the predictor's `upcoming`, made
    from what was routed until then; the cache then evicts by forecast instead of by habit.
    """
    if not isinstance(predictor, Foresight):
        raise TypeError(f"{type(predictor).__name__} does not look beyond the current token")
    policy = Predicted(trace.num_layers, trace.num_experts)
    cache = ShadowCache(policy, capacity, trace.num_layers, trace.num_experts)
    one_each = np.ones(trace.top_k, dtype=np.int64)
    for streams, rows in run_streams(predictor, trace, batch=1):
        for layer in range(trace.num_layers):
            show(predictor, trace, layer, streams, rows)
            policy.set_forecast(layer, predictor.upcoming(layer, streams)[0].astype(np.float64))
            cache.event(layer, np.sort(trace.ids[rows[0], layer].astype(np.int64)), one_each)
    hits, misses = np.array(cache.hits), np.array(cache.misses)
    return ReplayResult(hits, misses, trace.num_tokens, trace.num_tokens * trace.num_layers, capacity.total)


@dataclass(frozen=True)
class Row:
    """One policy's outcome."""

    policy: str
    result: ReplayResult
    gap_closed_frac: float
    """How far it gets from LRU (0) to the bound (1); nan where the two are equal."""


def usable_policies(has_popularity: bool) -> list[str]:
    """The policies that can be judged by replay alone: those that lack nothing."""
    have = {"", "popularity"} if has_popularity else {""}
    return [name for name in policy_names() if find_policy(name).needs in have]


def compare(
    events: Events,
    policies: Sequence[str],
    capacity: Capacity,
    popularity: Values | None = None,
    bypass: bool = False,
) -> list[Row]:
    """A row for each of `policies`, in that order, then the bound's.

    `popularity` [L, E]: see `PolicyMaker`. `bypass`: see `ShadowCache`; the bound is the same either way.
    """
    names = dict.fromkeys([*policies, REFERENCE])
    shape = (events.num_layers, events.num_experts)
    results = {name: replay_events(events, find_policy(name)(*shape, popularity), capacity, bypass) for name in names}
    results[BOUND] = replay_belady(events, capacity)
    low, high = (results[name].hits.sum() for name in (REFERENCE, BOUND))
    return [
        Row(name, results[name], gap_closed_frac(results[name].hits.sum(), low, high)) for name in [*policies, BOUND]
    ]


def _result(events: Events, hits: npt.NDArray[np.int64], capacity: Capacity) -> ReplayResult:
    misses = events.uses_by_layer() - hits
    return ReplayResult(hits, misses, events.num_tokens, events.num_events, capacity.total)
