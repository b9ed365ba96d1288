"""The fewest misses any cache could have: evict what is used again last (Belady 1966), for sets, with bypass.

Between two uses of an expert lies an interval; keeping the expert over it saves one miss and costs one slot. The most
intervals that fit are found greedily: whenever too many overlap, drop the one that ends last. An expert may be
fetched, used and dropped at once (bypass), which a real cache may not do, so the bound is a true lower one for sets of
any size, larger than the pool as well. BeladyWindow holds a live cache against it. Knows events and slots; no policy.

Shape alphabet: L layers, E experts per layer, M uses.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.events import NEVER, Events, events_from
from predictors.predictor import Ints

Mask = npt.NDArray[np.bool_]


def belady_hits(events: Events, capacity: Capacity, resident: Mask | None = None) -> npt.NDArray[np.int64]:
    """[L] hits of the best cache; `resident` [L, E] is what it holds at the start, nothing by default.

    Exact per layer and for a shared pool.
    """
    next_event = events.next_event_of_use()
    keep = _first_events(events, resident)
    hit = _shared(events, capacity.total, next_event, keep) if capacity.quotas is None else None
    if capacity.quotas is not None:
        hit = _per_layer(events, np.array(capacity.quotas), next_event, keep)
    return np.bincount(events.layer_of_use()[hit], minlength=events.num_layers)


def _first_events(events: Events, resident: Mask | None) -> npt.NDArray[np.int64]:
    """[L * E]: the event at which each expert held at the start is first used; NEVER for all others."""
    first = np.full(events.num_layers * events.num_experts, NEVER)
    if resident is not None:
        cells = events.cell_of_use()
        used, where = np.unique(cells, return_index=True)
        first[used] = events.event_of_use()[where]
        first[~resident.ravel()] = NEVER
    return first


def _per_layer(
    events: Events, quotas: npt.NDArray[np.int64], next_event: npt.NDArray[np.int64], keep: npt.NDArray[np.int64]
) -> Mask:
    """[M] whether each use hits. All layers advance together, one event of each at a time."""
    order, bounds = events.uses_by_step()
    cells = events.cell_of_use()[order]
    upcoming, hit = next_event[order], np.empty(len(order), dtype=bool)
    table, rows = keep.reshape(events.num_layers, -1), np.arange(events.num_layers)
    _trim_rows(table, quotas, rows)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        now = cells[start:end]
        hit[start:end] = keep[now] != NEVER
        keep[now] = upcoming[start:end]
        _trim_rows(table, quotas, rows)
    result = np.empty_like(hit)
    result[order] = hit
    return result


def _trim_rows(table: npt.NDArray[np.int64], quotas: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> None:
    """Drop from each row [E] of next events all but the quota's soonest; equal ones by index."""
    width = table.shape[1]
    order = np.argsort(table, axis=1, kind="stable")
    order[np.arange(width) < quotas[:, None]] = -1
    dropped = np.nonzero(order >= 0)
    table[dropped[0], order[dropped]] = NEVER


def _shared(events: Events, total: int, next_event: npt.NDArray[np.int64], keep: npt.NDArray[np.int64]) -> Mask:
    """[M] whether each use hits, with one pool for all layers."""
    hit = np.empty(len(next_event), dtype=bool)
    cells = events.cell_of_use()
    ends = np.where(keep == NEVER, -1, keep)
    """[L * E] the event each held expert is kept for; -1 for those not held."""
    bounds = events.offsets.tolist()
    upcoming = np.where(next_event == NEVER, -1, next_event)
    for start, end in itertools.pairwise(bounds):
        now = cells[start:end]
        hit[start:end] = ends[now] >= 0
        ends[now] = upcoming[start:end]
        for _ in range(np.count_nonzero(ends >= 0) - total):
            ends[ends.argmax()] = -1
    return hit


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

    def __init__(self, capacity: Capacity, num_layers: int, num_experts: int, num_events: int) -> None:
        self.last: WindowReport | None = None
        """The newest full window's."""
        self._capacity = capacity
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
        best = belady_hits(events, self._capacity, self._start)
        return WindowReport(len(events.experts), self._hits, int(best.sum()))
