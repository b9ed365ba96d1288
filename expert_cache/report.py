"""ExpertReport: one consistent picture of the experts for whoever draws or publishes it.

Copies, so that it can be kept: two reports subtracted are what happened between them. Any thread may
ask for one; numbers that the engine changes meanwhile may be a step apart. Knows no metrics library.

Shape alphabet: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expert_cache.counters import Counts


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
