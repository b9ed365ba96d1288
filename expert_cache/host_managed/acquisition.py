"""Acquisition: one MoE layer's experts for one step, from the request to the last one's release."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from expert_cache.running import PreparedWeights
from expert_cache.storage import ExpertReadError
from predictors.shape import MoELayer


@dataclass(slots=True)
class Acquisition:
    """What a layer asked for. Every expert is ready, failed, in flight, waiting or left on the host.

    Example: experts 1, 4, 6, 7 wanted, 4 resident, two slots to be had: ready = {4: ...},
    in_flight = {1, 6}, waiting = [7]. When 4 has run and is released, 7 moves to in_flight.
    """

    layer: MoELayer
    is_pinned: bool = True
    """False where nothing can be evicted anyway."""
    ready: dict[int, PreparedWeights] = field(default_factory=dict)
    """Experts that can run, pinned until released."""
    failed: dict[int, ExpertReadError] = field(default_factory=dict)
    """Experts whose bytes could not be read."""
    in_flight: set[int] = field(default_factory=set)
    """Experts on their way, pinned."""
    inputs: dict[int, PreparedWeights] = field(default_factory=dict)
    """Experts in flight whose gate and up can be read while down is still coming. Each is put here once, and taken out
    to be run."""
    on_host: list[int] = field(default_factory=list)
    """Experts that stay on the host: they are computed from their host copies."""
    waiting: deque[int] = field(default_factory=deque)
    """Experts that get a slot when one is released: the overflow that runs in waves."""
    streams: bool = False
    """Nearly all experts are wanted: they pass through in the order of the file (streaming.py)."""

    def next_ready(self) -> list[int]:
        """What to run now: everything, or of a stream the newest, whose slot the stream goes on through. Experts of the
        pools, which came first, fill the time in which nothing arrives."""
        return list(self.ready)[-1:] if self.streams else list(self.ready)

    @property
    def is_pending(self) -> bool:
        """Some experts have neither arrived nor failed."""
        return bool(self.in_flight or self.waiting)
