"""ShadowCache: what a policy's cache would hold and miss, from ids alone; the core of replay, also driven live.

Event-atomic: hits count against the state before the event, and members of the event's set do not evict one
another. A set larger than its pool runs in waves: every member without a slot beforehand is a miss, and the members
with the largest keep values stay. Moves no weights, knows no devices.

Shape alphabet: L layers, E experts per layer, n distinct experts of one event.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expert_cache.policies.policy import Floats, Ints, Policy, Values
from expert_cache.simulation.capacity import Capacity


class ShadowCache:
    """Residency by (layer, expert). Starts empty, keeps its state across sequences, as a server does."""

    def __init__(
        self, policy: Policy, capacity: Capacity, num_layers: int, num_experts: int, bypass: bool = False
    ) -> None:
        """`bypass`: misses are fetched to spare slots outside the pool, as many as one event needs; afterwards the
        pool keeps the experts of highest value, used just now or not."""
        if capacity.quotas is not None and len(capacity.quotas) != num_layers:
            raise ValueError(f"quotas has {len(capacity.quotas)} entries; give one for each of {num_layers} layers")
        self.resident: npt.NDArray[np.bool_] = np.zeros((num_layers, num_experts), dtype=bool)
        """[L, E]."""
        self.hits = [0] * num_layers
        self.misses = [0] * num_layers
        self._policy = policy
        self._num_experts = num_experts
        self._capacity = capacity
        self._bypass = bypass
        self._free = [capacity.total] if capacity.quotas is None else list(capacity.quotas)

    def event(self, layer: int, experts: Ints, counts: Ints, weights: Floats | None = None) -> int:
        """Run one event, with the arguments of `Policy.record`; how many of its experts were resident."""
        self._policy.record(layer, experts, counts, weights)
        num_hits = int(np.count_nonzero(self.resident[layer, experts]))
        num_misses = len(experts) - num_hits
        self.hits[layer] += num_hits
        self.misses[layer] += num_misses
        if num_misses:
            self._admit(layer, experts, num_misses)
        return num_hits

    def _admit(self, layer: int, experts: Ints, num_misses: int) -> None:
        shared = self._capacity.quotas is None
        pool, size = (
            (0, self._capacity.total) if self._capacity.quotas is None else (layer, self._capacity.quotas[layer])
        )
        resident = self.resident.reshape(-1) if shared else self.resident[layer]
        members = experts + layer * self._num_experts if shared else experts
        num_evictions = num_misses - self._free[pool]
        self._free[pool] = max(0, -num_evictions)
        if num_evictions <= 0:
            resident[members] = True
            return
        values = self._policy.keep_values_all().ravel() if shared else self._policy.keep_values(layer)
        if self._bypass:
            resident[members] = True
            evict(resident, values, members[:0], num_evictions)
        elif len(members) > size:
            resident[:] = False
            resident[members[np.argsort(values[members], kind="stable")[-size:]]] = True
        else:
            evict(resident, values, members, num_evictions)
            resident[members] = True


def evict(resident: npt.NDArray[np.bool_], values: Values, in_use: Ints, count: int) -> None:
    """Clear `count` entries of `resident` [E]: the smallest values first, the lower index where they tie."""
    candidates = np.where(resident, values, np.inf)
    candidates[in_use] = np.inf
    for _ in range(count):
        victim = candidates.argmin()
        candidates[victim] = np.inf
        resident[victim] = False
