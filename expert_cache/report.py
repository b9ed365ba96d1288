"""What the experts did: CacheCounters as they count, ExpertReport as one consistent picture for others.

A report holds copies, so that it can be kept: two reports subtracted are what happened between them. Any thread may
ask for one; numbers that the engine changes meanwhile may be a step apart. Knows no metrics library and loads no torch.

Shape alphabet: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Residency:
    """Where experts are, and what the link between the tiers has carried."""

    ready: NDArray[np.bool_]
    """[L, E] could run now."""
    unused: NDArray[np.bool_]
    """[L, E] of these, the ones brought ahead of time and not asked for yet."""
    fast_tier: str
    """"device": slots; "host": the mapped checkpoint, when there is no cache."""
    slow_tier: str
    """Where missing experts come from: "disk", or "host" (the page cache) below a GPU."""
    num_slots: int = 0
    """0: there is no cache."""
    slot_bytes: int = 0
    used_bytes: int = 0
    """Memory of the slots in use."""
    link_bytes: int = 0
    """Bytes read so far, whole blocks."""
    link_busy_s: float = 0.0
    """Time so far during which at least one read was in progress."""


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """Everything since the start, and what is resident now."""

    layers: tuple[int, ...]
    """Decoder layers that have experts."""
    expert_bytes: int
    tokens: Counts
    """[L, E] (token, choice) pairs each expert has computed."""
    counts: Mapping[str, NDArray[Any]]
    """[L] int64 or float64 by name: the fields of CacheCounters, and usage.PREDICTION_COUNTS."""
    residency: Residency
    shadow_hits: Mapping[str, int] = field(default_factory=dict)
    """Hits that other policies would have had, by name."""
    belady_gap_frac: float | None = None
    """Of the recent misses, the fraction that perfect foresight would have avoided."""
