"""LiveShadows: what other policies would have hit, on the traffic the real cache is serving.

A few shadow caches (ids only, no weights) see every event the cache sees. The answer to "would LFU do
better here?" without trying it on users.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from expert_cache.policies import find_policy
from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.shadow import ShadowCache
from predictors.predictor import Ints


class LiveShadows:
    """One ShadowCache per policy, as large as the real cache."""

    def __init__(self, names: Iterable[str], capacity: Capacity, num_layers: int, num_experts: int) -> None:
        """Raises ValueError for a policy there is not."""
        self._makers = {name: find_policy(name) for name in names}
        self._shape = num_layers, num_experts
        self._hits_before = dict.fromkeys(self._makers, 0)
        self._caches: dict[str, ShadowCache] = {}
        self.resize(capacity)

    def event(self, layer: int, experts: Ints, counts: Ints) -> None:
        """One layer's experts in one step, as in `Policy.record`."""
        for cache in self._caches.values():
            cache.event(layer, experts, counts)

    def resize(self, capacity: Capacity) -> None:
        """Start again, empty, at another size; hits so far stay counted."""
        self._hits_before |= self.hits()
        self._caches = {
            name: ShadowCache(maker(*self._shape, None), capacity, *self._shape, bypass=True)
            for name, maker in self._makers.items()
        }

    def hits(self) -> dict[str, int]:
        """Total hits by policy, since the start."""
        return {n: self._hits_before[n] + int(np.sum(c.hits)) for n, c in self._caches.items()}
