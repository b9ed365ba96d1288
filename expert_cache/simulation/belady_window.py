"""How far a live cache is from the best possible one, estimated over windows of its recent events."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expert_cache.capacity import Capacity
from expert_cache.policies.policy import Ints
from expert_cache.simulation.belady import belady_hits
from expert_cache.simulation.events import events_from


@dataclass(frozen=True)
class WindowReport:
    """One window's uses, the cache's hits, and the hits of the best cache that starts from the same residents."""

    uses: int
    hits: int
    belady_hits: int

    @property
    def avoidable_frac(self) -> float:
        """Of the misses, the fraction that the best cache would not have had."""
        misses = self.uses - self.hits
        return (self.belady_hits - self.hits) / misses if misses else 0.0


class BeladyWindow:
    """Collects (layer, experts, hits) of every event; each time `num_events` are full, it works out a report.

    The report is made from ids, so it costs milliseconds, once a window: about 5 us per event with pools per layer.
    The best cache does not see past the window's end, so the bound is that of the window, not of the whole run.
    """

    def __init__(self, slots: Capacity, num_layers: int, num_experts: int, num_events: int) -> None:
        self.last: WindowReport | None = None
        """The newest full window's."""
        self._slots = slots
        self._shape = (num_layers, num_experts)
        self._num_events = num_events
        self._start = np.zeros(self._shape, dtype=bool)
        self._sets: list[tuple[int, Ints]] = []
        self._hits = 0

    def add(self, layer: int, experts: Ints, num_hits: int, resident: npt.NDArray[np.bool_]) -> None:
        """After an event: its distinct ascending experts, how many hit, and [L, E] what is resident now."""
        self._sets.append((layer, np.array(experts)))
        self._hits += num_hits
        if len(self._sets) == self._num_events:
            self.last = self.report()
            self._start, self._sets, self._hits = resident.copy(), [], 0

    def report(self) -> WindowReport:
        """The unfinished window's."""
        events = events_from(self._sets, *self._shape)
        best = belady_hits(events, self._slots, self._start)
        return WindowReport(len(events.experts), self._hits, int(best.sum()))
