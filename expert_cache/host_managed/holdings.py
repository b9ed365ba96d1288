"""Holdings: what an expert cache holds and what is on its way into it, for those who decide what that should be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from expert_cache.host_managed.claims import SlotClaims
from expert_cache.host_managed.in_flight import InFlight
from expert_cache.host_managed.slot_table import SlotTable
from expert_cache.report import CacheCounters
from expert_cache.running import PreparedWeights
from expert_cache.storage import ExpertReadError, ExpertStore, ExpertWeights, Fetcher, SlotArena
from predictors.shape import Key


class Holdings:
    """Slots, the weights in them, and reads that fill others."""

    def __init__(
        self,
        store: ExpertStore,
        prepare: Callable[[ExpertWeights], PreparedWeights],
        arena: SlotArena,
        table: SlotTable,
        fetcher: Fetcher,
        start_early_bytes: int,
    ) -> None:
        self.store, self.arena, self.table = store, arena, table
        self.counters = CacheCounters(len(store.layers))
        self.weights: dict[Key, PreparedWeights] = {}
        """Of the experts that are ready."""
        self.in_flight = InFlight(store, prepare, arena, table, fetcher, self.counters, start_early_bytes)
        self.claims = SlotClaims(table, self.in_flight, self.weights, self.counters, store.expert_bytes)

    @property
    def everything_fits(self) -> bool:
        """There is a slot for every expert, so that none is ever evicted."""
        return self.table.allowed.total >= self.store.num_total

    def land(self, key: Key) -> PreparedWeights | ExpertReadError:
        """Book a read that is done."""
        outcome = self.in_flight.land(key)
        if not isinstance(outcome, ExpertReadError):
            self.weights[key] = outcome
        return outcome

    def land_prefetches(self) -> None:
        """Book prefetches that have finished. A failed one is forgotten: if the router wants it, it is read again."""
        for key in self.in_flight.prefetches():
            if self.in_flight.is_done(key) and not isinstance(self.land(key), ExpertReadError):
                self.table.not_asked_yet[key] = True

    def has(self, key: Key) -> bool:
        """It is ready, or on its way."""
        return key in self.weights or key in self.in_flight

    def check_integrity(self) -> None:
        """Prove the invariants; AssertionError says which one broke."""
        self.table.check_integrity()
        self.in_flight.check_integrity()
        ready = {(int(i), int(e)) for i, e in np.argwhere(self.table.slot_of >= 0)}
        assert set(self.weights) == ready, "weights and slots disagree"
        for key, weights in self.weights.items():
            start = self.arena.tensor(int(self.table.slot_of[key])).data_ptr()
            down = weights.down if isinstance(weights.down, torch.Tensor) else weights.down.tensors[0]
            inside = start <= down.data_ptr() < start + self.arena.slot_bytes
            assert inside or self.store.is_copied, "weights lie outside their slot"
