"""Inter-layer affinity counted while serving: which experts of the next layer follow these of this layer.

For a model without a trace; `methods/transition.py` is fitted to a trace, and its recall is higher. Counts how often
expert b of layer l+1 was used in a step that used expert a of layer l: the affinity of ExFlow, used as a Markov
model. Knows numpy only.

Shape alphabet: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

HALF_LIFE_STEPS = 2048
"""Old habits count half after this many steps: long against a request, short against a day's drift."""


class Successors:
    """P(next layer's expert | this layer's experts), from counts."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._counts = np.zeros((num_layers, num_experts, num_experts), np.float32)
        self._weight = np.ones(num_layers, np.float64)
        self._growth = 2.0 ** (1.0 / HALF_LIFE_STEPS)

    def record(self, layer: int, experts: Sequence[int], next_experts: Sequence[int]) -> None:
        """One step used `experts` in `layer` and `next_experts` in the layer after it."""
        # Instead of shrinking every old count, each new one weighs a little more than the last.
        self._counts[layer][np.ix_(experts, next_experts)] += self._weight[layer]
        self._weight[layer] *= self._growth
        if self._weight[layer] > 1e6:
            self._counts[layer] /= self._weight[layer]
            self._weight[layer] = 1.0

    def scores(self, layer: int, experts: Sequence[int]) -> NDArray[np.float64]:
        """[E] for layer + 1: expected uses, relative to one another; zeros before anything was recorded."""
        rows = self._counts[layer][list(experts)].astype(np.float64)
        totals = rows.sum(axis=1, keepdims=True)
        shares = np.divide(rows, totals, out=np.zeros_like(rows), where=totals > 0)
        total: NDArray[np.float64] = shares.sum(axis=0)
        return total
