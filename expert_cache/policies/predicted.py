"""LFRU protected by a forecast: experts that a predictor expects within the next tokens outrank the others.

Knowing several tokens ahead saves misses; knowing the next layer does not (the NInfer replay: -8 to -10 points with a
five-token horizon, -0.1 % of misses with the next layer). So `set_forecast` takes the expected uses over a horizon that
its maker chooses. Without a forecast this is LFRU to the bit.
"""

from __future__ import annotations

import numpy as np

from expert_cache.policies.lfru import LFRU
from expert_cache.policies.policy import Values


class Predicted(LFRU):
    """value = expected uses + LFRU's value per step, which lies in 0..1 and orders what the forecast leaves level.

    A forecast counts from when it is set until it is replaced or cleared.
    """

    needs = "forecast"

    def __init__(self, num_layers: int, num_experts: int, popularity: Values | None = None) -> None:
        super().__init__(num_layers, num_experts, popularity)
        self._forecast = np.zeros((num_layers, num_experts))
        self._has_forecast = np.zeros(num_layers, dtype=bool)

    def set_forecast(self, layer: int, values: Values | None) -> None:
        """Expected uses of each expert, [E] finite and >= 0, over the predictor's horizon; None clears it."""
        self._has_forecast[layer] = values is not None
        self._forecast[layer] = 0 if values is None else values

    def keep_values(self, layer: int) -> Values:
        base = super().keep_values(layer)
        if not self._has_forecast[layer]:
            return base
        values: Values = base / np.maximum(self._step[layer], 1) + self._forecast[layer]
        return values

    def keep_values_all(self) -> Values:
        base = super().keep_values_all()
        if not self._has_forecast.any():
            return base
        values: Values = base / np.maximum(self._step, 1) + self._forecast
        return values


POLICY = Predicted
