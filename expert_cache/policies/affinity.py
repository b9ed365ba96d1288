"""How often an expert is used, times how well it follows the experts just used: frequency and affinity, counted live.

Two estimates, both plain counts that start empty and need no training:

rate   uses per step, as a decaying average plus the average since the start: what is popular now, and at all.
lift   which experts follow which: after expert q was used, how much more often than usual is e used in the next
       steps of the same layer? Averaged, as a logarithm, over the experts q of the newest step.

value = log rate + 2 mean log lift, a naive Bayes estimate of "used soon" with the evidence toned down, since the
experts of one step are not independent witnesses. The constants were chosen on parts of two traces, and results
barely depend on them (docs/log/policies.md). ExFlow counts transitions between the experts of successive layers
to place experts; here they are counted within a layer, over the next tokens, and protect from eviction.
"""

from __future__ import annotations

import numpy as np

from expert_cache.policies.policy import Floats, Ints, Values

RATE_DECAY = 0.95
"""Per step: an average over about the last 20."""
TRAIL_DECAY = 0.6
"""Per step: a use counts as following what was used in the few steps before it, the latest most."""
LIFT_WEIGHT = 2.0
PRIOR_USES = 10.0
"""Pairs count as independent until they were seen about this often."""
HALVING_STEPS = 4096
"""Counts that reach this many steps are halved, so that a change of workload is followed."""


class Affinity:
    """O(n E) per event, n experts in the event's set; E x E counts per layer."""

    needs = ""

    def __init__(self, num_layers: int, num_experts: int, popularity: Values | None = None) -> None:
        self._values = np.zeros((num_layers, num_experts))
        self._layers = [_Layer(num_experts) for _ in range(num_layers)]
        self._stale: set[int] = set()
        """Layers with events since their row of `_values` was worked out."""

    def record(self, layer: int, experts: Ints, counts: Ints, weights: Floats | None) -> None:
        self._layers[layer].record(experts)
        self._stale.add(layer)

    def keep_values(self, layer: int) -> Values:
        if layer in self._stale:
            self._values[layer] = self._layers[layer].estimate()
            self._stale.remove(layer)
        row: Values = self._values[layer]
        return row

    def keep_values_all(self) -> Values:
        for layer in tuple(self._stale):
            self.keep_values(layer)
        return self._values


class _Layer:
    """One layer's counts."""

    def __init__(self, num_experts: int) -> None:
        self.steps = 0
        self.uses = np.zeros(num_experts)
        self.rate = np.zeros(num_experts)
        self.trail = np.zeros(num_experts)
        """Uses before now, decayed."""
        self.follows = np.zeros((num_experts, num_experts))
        """[q, e]: the trail of q, summed over the uses of e."""
        self.newest: Ints = np.zeros(0, dtype=np.int64)

    def record(self, experts: Ints) -> None:
        self.follows[:, experts] += self.trail[:, None]
        self.trail *= TRAIL_DECAY
        self.trail[experts] += 1 - TRAIL_DECAY
        self.rate *= RATE_DECAY
        self.rate[experts] += 1 - RATE_DECAY
        self.uses[experts] += 1
        self.steps += 1
        self.newest = experts.copy()
        if self.steps == HALVING_STEPS:
            self._halve()

    def estimate(self) -> Values:
        usual = (self.uses + 1) / (self.steps + 1)
        seen = self.follows.take(self.newest, axis=0)
        seen /= usual
        seen += PRIOR_USES
        lift = np.log(seen, out=seen).sum(axis=0) - np.log(self.uses.take(self.newest) + PRIOR_USES).sum()
        values: Values = np.log(self.rate + usual) + lift * (LIFT_WEIGHT / max(1, len(self.newest)))
        return values

    def _halve(self) -> None:
        self.steps //= 2
        self.uses /= 2
        self.follows /= 2


POLICY = Affinity
