"""Several policies on the same events and slots, beside LRU and the bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expert_cache.capacity import Capacity
from expert_cache.policies import find_policy, policy_names
from expert_cache.policies.policy import Values
from expert_cache.simulation.events import Events
from expert_cache.simulation.replay import ReplayResult, gap_closed_frac, replay_belady, replay_events

BOUND = "belady"
REFERENCE = "lru"


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
    slots: Capacity,
    popularity: Values | None = None,
    bypass: bool = False,
) -> list[Row]:
    """A row for each of `policies`, in that order, then the bound's.

    `popularity` [L, E]: see `PolicyMaker`. `bypass`: see `ShadowCache`; the bound is the same either way.
    """
    names = dict.fromkeys([*policies, REFERENCE])
    shape = (events.num_layers, events.num_experts)
    results = {name: replay_events(events, find_policy(name)(*shape, popularity), slots, bypass) for name in names}
    results[BOUND] = replay_belady(events, slots)
    low, high = (results[name].hits.sum() for name in (REFERENCE, BOUND))
    return [
        Row(name, results[name], gap_closed_frac(results[name].hits.sum(), low, high)) for name in [*policies, BOUND]
    ]
