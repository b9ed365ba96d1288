"""ExpertUsage: how many tokens each expert got, and how well what was advised matched what was used.

Counted once per layer and step, from the regrouped experts: plain integers in lists, because a decode
step touches a handful of experts and numpy's call would cost more than the additions. Knows no cache.

Shape alphabet: L layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expert_cache.counters import Counts

PREDICTION_COUNTS = ("predicted_used", "predicted_unused", "unpredicted")
"""True positives, false positives and false negatives of the advice, as `ExpertUsage.predictions` names them."""


class ExpertUsage:
    """Monotone counts; readers take differences. Written by one thread, read by any."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        """`layers`: decoder layers that have experts."""
        self._tokens = {layer: [0] * num_experts for layer in layers}
        self._outcomes = {layer: [0] * len(PREDICTION_COUNTS) for layer in layers}
        self._expected: dict[int, Sequence[int]] = {}

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """An advisor expects these in the coming step of `layer`; the last word before it counts."""
        self._expected[layer] = experts

    def use(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """The router of `layer` chose these, each for so many tokens."""
        tokens = self._tokens[layer]
        for expert, count in zip(experts, counts, strict=True):
            tokens[expert] += count
        expected = self._expected.pop(layer, None)
        if expected is not None:
            right = len(set(expected).intersection(experts))
            outcomes = self._outcomes[layer]
            outcomes[0] += right
            outcomes[1] += len(expected) - right
            outcomes[2] += len(experts) - right

    def tokens(self) -> Counts:
        """[L, E] (token, choice) pairs so far."""
        return np.array(list(self._tokens.values()), np.int64)

    def predictions(self) -> dict[str, Counts]:
        """[L] expected and used, expected in vain, used but not expected; steps without advice count in none."""
        outcomes = np.array(list(self._outcomes.values()), np.int64)
        return dict(zip(PREDICTION_COUNTS, outcomes.T, strict=True))
