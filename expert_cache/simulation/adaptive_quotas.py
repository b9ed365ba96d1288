"""AdaptiveQuotas: how many slots each layer needs, solved again and again from the live cache's own events.

ExpertFlow gives each layer cache slots by predicted need, anew as the need changes (PLEC). Here the need is what the
last windows of traffic show: LRU's hits by number of slots (quotas.py beside it). A new split is solved on the
windows before the newest and tried on the newest, which it has not seen; it is taken only if there it saves enough
misses to be worth moving experts about. So a workload without differences between layers keeps what it has. Knows ids
only.

Shape alphabet: L layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.events import events_from
from expert_cache.simulation.quotas import best_split, lru_hit_curves
from predictors.predictor import Ints

WINDOW_STEPS = 256
WORTH_FRAC = 0.02
"""New quotas must save this fraction of the newest window's misses."""
OLD_WEIGHT = 0.5
"""What a window weighs against the one after it."""


class AdaptiveQuotas:
    """Collects events; `proposal` once a window, or nothing."""

    def __init__(self, num_layers: int, num_experts: int, window_steps: int = WINDOW_STEPS) -> None:
        self.num_changes = 0
        self._shape = num_layers, num_experts
        self._num_events = window_steps * num_layers
        self._sets: list[tuple[int, Ints]] = []
        self._curves: npt.NDArray[np.float64] | None = None
        """[L, E+1] LRU's hits by slots, over the windows before the newest, older ones weighing less."""

    def add(self, layer: int, experts: Ints) -> None:
        """An event: the distinct experts that a step used."""
        self._sets.append((layer, np.array(experts)))

    @property
    def is_due(self) -> bool:
        """A window is full."""
        return len(self._sets) >= self._num_events

    def proposal(self, quotas: Sequence[int]) -> Capacity | None:
        """Better quotas than the ones in force, with the same sum; None where they would not pay. Ends the window."""
        events = events_from(self._sets, *self._shape)
        self._sets = []
        newest, before = lru_hit_curves(events), self._curves
        self._curves = newest.astype(np.float64) if before is None else newest + OLD_WEIGHT * before
        if before is None:
            return None
        candidate = best_split(before, sum(quotas))
        layers = np.arange(self._shape[0])
        hits_now, hits_then = (int(newest[layers, np.asarray(q)].sum()) for q in (quotas, candidate))
        if hits_then - hits_now <= WORTH_FRAC * (len(events.experts) - hits_now):
            return None
        self.num_changes += 1
        return Capacity.per_layer(candidate)
