"""Least frequently used: how many steps used an expert since the start. Never forgets."""

from __future__ import annotations

import numpy as np

from expert_cache.policies.policy import Floats, Ints, Policy, Values


class LFU(Policy):
    """Steps, not tokens: what a step must fetch does not depend on how many tokens want it."""

    needs = ""

    def __init__(self, num_layers: int, num_experts: int, popularity: Values | None = None) -> None:
        self._uses = np.zeros((num_layers, num_experts))

    def record(self, layer: int, experts: Ints, counts: Ints, weights: Floats | None) -> None:
        self._uses[layer, experts] += 1

    def keep_values_all(self) -> Values:
        return self._uses


POLICY = LFU
