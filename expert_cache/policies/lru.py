"""Least recently used: the last event that used an expert is its value."""

from __future__ import annotations

import numpy as np

from expert_cache.policies.policy import Floats, Ints, Policy, Values


class LRU(Policy):
    """Experts never used rank below all others."""

    needs = ""

    def __init__(self, num_layers: int, num_experts: int, popularity: Values | None = None) -> None:
        self._last_event = np.zeros((num_layers, num_experts))
        self._num_events = 0

    def record(self, layer: int, experts: Ints, counts: Ints, weights: Floats | None) -> None:
        self._num_events += 1
        self._last_event[layer, experts] = self._num_events

    def keep_values_all(self) -> Values:
        return self._last_event


POLICY = LRU
