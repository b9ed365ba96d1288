"""What the routers chose: tokens per expert, how well advice matched, and one step's routes for those who want them.

Counted once per layer and step, from the regrouped experts: plain integers in lists, because a decode
step touches a handful of experts and numpy's call would cost more than the additions. Knows no cache and no tokens'
owners.

Shape alphabet: L layers, E experts per layer, T tokens of a step, K choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from expert_cache.report import Counts
from predictors.predictor import Floats, Ints
from predictors.shape import MoELayer

PREDICTION_COUNTS = ("predicted_used", "predicted_unused", "unpredicted")
"""True positives, false positives and false negatives of the advice, as `ExpertUsage.predictions` names them."""


class ExpertUsage:
    """Monotone counts; readers take differences. Written by one thread, read by any."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._tokens = [[0] * num_experts for _ in range(num_layers)]
        self._outcomes = [[0] * len(PREDICTION_COUNTS) for _ in range(num_layers)]
        self._expected: dict[MoELayer, Sequence[int]] = {}

    def expect(self, layer: MoELayer, experts: Sequence[int]) -> None:
        """An advisor expects these in the coming step of `layer`; the last word before it counts."""
        self._expected[layer] = experts

    def use(self, layer: MoELayer, experts: Sequence[int], counts: Sequence[int]) -> None:
        """The router of `layer` chose these, each for this many tokens."""
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
        return np.array(self._tokens, np.int64)

    def predictions(self) -> dict[str, Counts]:
        """[L] expected and used, expected in vain, used but not expected; steps without advice count in none."""
        outcomes = np.array(self._outcomes, np.int64)
        return dict(zip(PREDICTION_COUNTS, outcomes.T, strict=True))


class RouteBuffer:
    """What the routers chose during one step. Off until someone wants to know.

    Keeps the routers' own tensors and copies nothing until the step is over, so that a GPU is not waited for in every
    layer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.is_on = False
        self.keeps_weights = False
        self._num_layers = num_layers
        self._dtype = torch.uint8 if num_experts <= 256 else torch.int16
        self._ids: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def add(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """The next layer's choices [T, K] and their weights."""
        if self.is_on:
            self._ids.append(ids)
            if self.keeps_weights:
                self._weights.append(weights)

    def clear(self) -> None:
        """Forget a step that failed."""
        self._ids.clear()
        self._weights.clear()

    def take(self) -> tuple[Ints, Floats | None]:
        """ids [T, L, K] and weights [T, L, K] float32 (None unless kept) of the step that has just ended."""
        assert len(self._ids) == self._num_layers, "a layer's router was not seen, or twice"
        ids: Ints = torch.stack(self._ids, dim=1).to(self._dtype).cpu().numpy()
        weights: Floats | None = None
        if self.keeps_weights:
            weights = torch.stack(self._weights, dim=1).float().cpu().numpy()
        self.clear()
        return ids, weights
