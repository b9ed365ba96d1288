"""Frequency over age: an expert's uses divided by the steps since its last use (LFRU, vLLM pull request 37190)."""

from __future__ import annotations

import numpy as np

from expert_cache.policies.policy import Floats, Ints, Values


class LFRU:
    """value = uses / (1 + age), both in steps of the expert's own layer."""

    needs = ""

    def __init__(self, num_layers: int, num_experts: int, popularity: Values | None = None) -> None:
        self._uses = np.zeros((num_layers, num_experts))
        self._last_step = np.zeros((num_layers, num_experts))
        self._step = np.zeros((num_layers, 1))

    def record(self, layer: int, experts: Ints, counts: Ints, weights: Floats | None) -> None:
        self._step[layer] += 1
        self._uses[layer, experts] += 1
        self._last_step[layer, experts] = self._step[layer]

    def keep_values(self, layer: int) -> Values:
        age = self._step[layer] - self._last_step[layer]
        values: Values = self._uses[layer] / (age + 1)
        return values

    def keep_values_all(self) -> Values:
        values: Values = self._uses / (self._step - self._last_step + 1)
        return values


POLICY = LFRU
