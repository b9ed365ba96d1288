"""A fixed ranking by popularity on an earlier trace: what placing the hottest experts once would give."""

from __future__ import annotations

import numpy as np

from expert_cache.policies.policy import Floats, Ints, Policy, Values


class Static(Policy):
    """Watches nothing. Without a popularity all experts are equal and the lowest index goes first."""

    needs = "popularity"

    def __init__(self, num_layers: int, num_experts: int, popularity: Values | None = None) -> None:
        unknown = np.zeros((num_layers, num_experts))
        self._popularity = unknown if popularity is None else np.array(popularity, dtype=np.float64)

    def record(self, layer: int, experts: Ints, counts: Ints, weights: Floats | None) -> None:
        pass

    def keep_values_all(self) -> Values:
        return self._popularity


POLICY = Static
