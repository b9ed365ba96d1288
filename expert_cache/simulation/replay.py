"""Replay: a trace through a policy's cache, to judge the policy without a device.

The cache is `shadow.py`'s, the bound `belady.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expert_cache.capacity import Capacity
from expert_cache.policies.policy import Policy
from expert_cache.simulation.belady import belady_hits
from expert_cache.simulation.events import Events, events_of
from expert_cache.simulation.shadow import ShadowCache
from predictors.trace import RoutingTrace


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


def replay(
    trace: RoutingTrace, policy: Policy, slots: Capacity, concurrency: int = 1, bypass: bool = False
) -> ReplayResult:
    """All sequences of the trace, `concurrency` at a time, through a `ShadowCache` that starts empty."""
    return replay_events(events_of(trace, concurrency), policy, slots, bypass)


def replay_events(events: Events, policy: Policy, slots: Capacity, bypass: bool = False) -> ReplayResult:
    """The same from events, which replays of several policies can share."""
    cache = ShadowCache(policy, slots, events.num_layers, events.num_experts, bypass)
    for layer, experts, counts, weights in events:
        cache.event(layer, experts, counts, weights)
    return _result(events, np.array(cache.hits), slots)


def replay_belady(events: Events, slots: Capacity) -> ReplayResult:
    """The bound: no policy misses less."""
    return _result(events, belady_hits(events, slots), slots)


def gap_closed_frac(hits: float, lru_hits: float, belady_hits: float) -> float:
    """How far a policy gets from LRU (0) to Belady (1); nan where there is nothing between them."""
    return float((hits - lru_hits) / (belady_hits - lru_hits)) if belady_hits > lru_hits else float("nan")


def _result(events: Events, hits: npt.NDArray[np.int64], slots: Capacity) -> ReplayResult:
    misses = events.uses_by_layer() - hits
    return ReplayResult(hits, misses, events.num_tokens, events.num_events, slots.total)
