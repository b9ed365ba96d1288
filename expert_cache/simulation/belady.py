"""The fewest misses any cache could have: evict what is used again last (Belady 1966), for sets, with bypass.

Between two uses of an expert lies an interval; keeping the expert over it saves one miss and costs one slot. The most
intervals that fit are found greedily: whenever too many overlap, drop the one that ends last. An expert may be
fetched, used and dropped at once (bypass), which a real cache may not do, so the bound is a true lower one for sets of
any size, larger than the pool as well. Knows events and slots; no policy.

Shape alphabet: L layers, E experts per layer, M uses.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from expert_cache.capacity import Capacity
from expert_cache.simulation.events import NEVER, Events

Mask = npt.NDArray[np.bool_]


def belady_hits(events: Events, slots: Capacity, resident: Mask | None = None) -> npt.NDArray[np.int64]:
    """[L] hits of the best cache; `resident` [L, E] is what it holds at the start, nothing by default.

    Exact per layer and for a shared pool.
    """
    next_event = events.next_event_of_use()
    keep = _first_events(events, resident)
    hit = _shared(events, slots.total, next_event, keep) if slots.quotas is None else None
    if slots.quotas is not None:
        hit = _per_layer(events, np.array(slots.quotas), next_event, keep)
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
