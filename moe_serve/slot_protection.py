"""SlotProtection: tells the `predicted` policy which experts the running sequences are expected to use.

An expert is worth its slot if tokens will come for it soon, whoever's they are. Each running sequence's recent use
says what its next tokens will want (moe_serve/usage_forecast.py); the sum over all of them, those that do not decode
in this step included, is the expected demand of the next steps. MoE-Infinity protects by the activations of similar
sequences; here the sequences that run speak for themselves. Knows no torch.

Shape alphabet: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_serve.batch_choice import Forecasts
from moe_serve.batch_plan import BatchPlan, StepResult
from moe_serve.sequence import Sequence


class Forecastable(Protocol):
    """expert_cache/policies/predicted.py."""

    def set_forecast(self, layer: int, values: NDArray[np.float64] | None) -> None: ...


class SlotProtection:
    """A RouteListener that must hear of a step after its forecasts have."""

    wants_weights = False

    def __init__(
        self,
        policy: Forecastable,
        forecasts: Forecasts,
        running: Callable[[], list[Sequence]],
        num_layers: int,
        tokens_ahead: float,
    ) -> None:
        """`tokens_ahead`: the horizon, in tokens of a sequence: expected uses are those of so many."""
        self._policy = policy
        self._forecasts = forecasts
        self._running = running
        self._num_layers = num_layers
        self._tokens_ahead = tokens_ahead

    def on_routes(self, plan: BatchPlan, result: StepResult) -> None:
        """Replace the forecast of every layer."""
        sequences = self._running()
        if not sequences:
            return
        expected = self._forecasts.of(sequences).sum(axis=0).reshape(self._num_layers, -1)
        for layer, values in enumerate(expected.astype(np.float64) * self._tokens_ahead):
            self._policy.set_forecast(layer, values)
