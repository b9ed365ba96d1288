"""CacheCounters: what the expert cache did, by layer, since the start.

Shape alphabet: L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ExpertTotals:
    """CacheCounters over all layers, and differences of such; see there for what each means."""

    hits: float = 0
    misses: float = 0
    host_runs: float = 0
    prefetch_hits: float = 0
    late_prefetches: float = 0
    evictions: float = 0
    demand_bytes: float = 0
    prefetch_bytes: float = 0
    wasted_bytes: float = 0
    read_errors: float = 0
    stall_s: float = 0

    def since(self, before: ExpertTotals) -> ExpertTotals:
        """What was added after `before` was taken."""
        return ExpertTotals(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


class CacheCounters:
    """Monotone counts [L]; readers take differences."""

    def __init__(self, num_layers: int) -> None:
        self.hits: Counts = np.zeros(num_layers, np.int64)
        """(step, expert) uses whose expert was in a slot when the router asked."""
        self.misses: Counts = np.zeros(num_layers, np.int64)
        """Uses whose expert was not in a slot; a late prefetch is one of them."""
        self.host_runs: Counts = np.zeros(num_layers, np.int64)
        """Misses that were computed where the expert was, on the host, instead of bringing it."""
        self.prefetch_hits: Counts = np.zeros(num_layers, np.int64)
        """Hits that are owed to a prefetch: first use of an expert that was predicted."""
        self.late_prefetches: Counts = np.zeros(num_layers, np.int64)
        """Misses whose prefetch was under way."""
        self.evictions: Counts = np.zeros(num_layers, np.int64)
        self.demand_bytes: Counts = np.zeros(num_layers, np.int64)
        """Bytes read because the router asked."""
        self.prefetch_bytes: Counts = np.zeros(num_layers, np.int64)
        """Bytes read on a prediction, useful or not."""
        self.wasted_bytes: Counts = np.zeros(num_layers, np.int64)
        """Prefetched bytes that were cancelled or evicted before any use."""
        self.prefetch_on: NDArray[np.bool_] = np.ones(num_layers, np.bool_)
        """No count: whether the audit lets this layer prefetch at the moment."""
        self.read_errors: Counts = np.zeros(num_layers, np.int64)
        self.stall_s: NDArray[np.float64] = np.zeros(num_layers)
        """Seconds the model waited for experts."""

    def totals(self) -> ExpertTotals:
        """Sums over the layers."""
        return ExpertTotals(*(float(getattr(self, f.name).sum()) for f in fields(ExpertTotals)))

    def by_layer(self) -> dict[str, NDArray[np.int64] | NDArray[np.float64]]:
        """Copies [L] by name."""
        return {f.name: getattr(self, f.name).copy() for f in fields(ExpertTotals)}

    @property
    def num_hits(self) -> int:
        return int(self.hits.sum())

    @property
    def num_misses(self) -> int:
        return int(self.misses.sum())
