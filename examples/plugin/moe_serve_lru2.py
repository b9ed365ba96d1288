"""LRU-2: an expert is worth what its second-last use was worth, so a single use does not keep it.

The laws that it keeps stand in expert_cache/policies/policy.py.
"""

from __future__ import annotations

import numpy as np

from expert_cache.policies.policy import Floats, Ints, Values

BREAKS_TIES = 1e-9
"""Weight of the last use among experts with equal second-last uses."""


class LRU2:
    """Experts used once rank above those never used, and below those used twice."""

    needs = ""

    def __init__(self, num_layers: int, num_experts: int, popularity: Values | None = None) -> None:
        self._last = np.zeros((num_layers, num_experts))
        self._second_last = np.zeros((num_layers, num_experts))
        self._num_events = 0

    def record(self, layer: int, experts: Ints, counts: Ints, weights: Floats | None) -> None:
        self._num_events += 1
        self._second_last[layer, experts] = self._last[layer, experts]
        self._last[layer, experts] = self._num_events

    def keep_values(self, layer: int) -> Values:
        row: Values = self._second_last[layer] + BREAKS_TIES * self._last[layer]
        return row

    def keep_values_all(self) -> Values:
        values: Values = self._second_last + BREAKS_TIES * self._last
        return values
