"""Observers: those who follow what is asked of an expert cache, to judge it or to advise it. They hold no expert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expert_cache.policies.policy import Ints, Policy
from expert_cache.simulation.adaptive_quotas import AdaptiveQuotas
from expert_cache.simulation.belady import BeladyWindow
from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.live_shadows import LiveShadows
from predictors.shape import MoELayer

WINDOW_STEPS = 256
"""Steps over which the cache is compared with the best possible one."""


class Observers:
    """The policy, the policies that might have been chosen instead, perfect foresight, and the layers' shares."""

    def __init__(
        self,
        policy: Policy,
        capacity: Capacity,
        num_layers: int,
        num_experts: int,
        shadows: LiveShadows | None = None,
        quotas: AdaptiveQuotas | None = None,
    ) -> None:
        self.policy, self.shadows, self.quotas = policy, shadows, quotas
        self._shape = num_layers, num_experts
        self._capacity = capacity
        self._window = self._new_window()

    def record(self, layer: MoELayer, experts: Ints, counts: Ints) -> None:
        """A layer's distinct experts, ascending, and the tokens of each, before anything is evicted for them."""
        self.policy.record(layer, experts, counts, None)
        if self.shadows is not None:
            self.shadows.event(layer, experts, counts)
        if self.quotas is not None and self._capacity.quotas is not None:
            self.quotas.add(layer, experts)

    def found(self, layer: MoELayer, experts: Ints, num_ready: int, resident: NDArray[np.bool_]) -> None:
        """`num_ready` of them were ready; `resident` [L, E]: the experts that have a slot."""
        self._window.add(layer, experts, num_ready, resident)

    def better_quotas(self) -> Capacity | None:
        """Other shares of the layers in the same slots, where a window of traffic is over and they would pay."""
        now = self._capacity.quotas
        if self.quotas is None or now is None or not self.quotas.is_due:
            return None
        return self.quotas.proposal(now)

    def resized(self, capacity: Capacity) -> None:
        """The cache has other pools now."""
        self._capacity = capacity
        self._window = self._new_window()
        if self.shadows is not None:
            self.shadows.resize(capacity)

    @property
    def belady_gap_frac(self) -> float | None:
        """Of the misses of the last full window of events, the fraction that perfect foresight would have avoided."""
        last = self._window.last
        # The window after a resize starts as if the cache were empty, so the bound may lie below what was reached.
        return None if last is None else max(0.0, last.avoidable_frac)

    @property
    def shadow_hits(self) -> dict[str, int]:
        """What other policies would have hit so far, by name."""
        return {} if self.shadows is None else self.shadows.hits()

    def _new_window(self) -> BeladyWindow:
        num_layers, num_experts = self._shape
        return BeladyWindow(self._capacity, num_layers, num_experts, WINDOW_STEPS * num_layers)
