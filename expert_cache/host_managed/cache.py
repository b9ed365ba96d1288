"""ExpertCache: experts in slots and on their way: ahead of time, between steps, and what the outside sees.

One thread, the engine's, calls it; the Fetcher's threads only fill memory. A layer's step is `acquirer`'s. Knows no
tokens and no arithmetic.

Shape alphabet: L layers, E experts per layer, S slots.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from expert_cache.host_compute.miss_choice import MissChoice
from expert_cache.host_managed.acquirer import Acquirer
from expert_cache.host_managed.holdings import Holdings
from expert_cache.host_managed.in_flight import START_EARLY_BYTES
from expert_cache.host_managed.slot_table import SlotTable
from expert_cache.policies.policy import Policy
from expert_cache.report import Residency
from expert_cache.running import PreparedWeights, layers_of
from expert_cache.simulation.capacity import Capacity, resized
from expert_cache.simulation.observers import Observers
from expert_cache.storage import ExpertStore, ExpertWeights, Fetcher, SlotArena
from moe_serve_kernels.cpu.expert_layer import ExpertLayer
from predictors.shape import MoELayer

SLOTS_PER_TRANSIT = 8
"""One slot in transit for every 8 slots: the pools lose an eighth at most."""


class ExpertCache:
    """Slots for some of a store's experts, kept by a policy."""

    def __init__(
        self,
        store: ExpertStore,
        prepare: Callable[[ExpertWeights], PreparedWeights],
        arena: SlotArena,
        capacity: Capacity,
        num_transit: int,
        policy: Policy,
        fetcher: Fetcher,
        start_early_bytes: int = START_EARLY_BYTES,
        observers: Observers | None = None,
        misses: MissChoice | None = None,
    ) -> None:
        """`num_transit`: slots beside `capacity` in which experts arrive before it is decided who stays.
        `observers`: of `policy`; None: only the policy is told which experts are asked for. `misses`: leaves missing
        experts on the host; None: all are brought.

        `arena` has at least as many slots as the two together; more allow growing later.
        """
        shape = len(store.layers), store.num_experts
        self.store, self.arena, self.policy, self.fetcher = store, arena, policy, fetcher
        self.table = SlotTable(*shape, arena.num_slots, capacity, num_transit, policy)
        self._holdings = Holdings(store, prepare, arena, self.table, fetcher, start_early_bytes)
        self.counters, self.in_flight = self._holdings.counters, self._holdings.in_flight
        self.observers = observers or Observers(policy, capacity, *shape)
        self.acquirer = Acquirer(self._holdings, self.observers, misses)
        self._most_transit = num_transit
        self._in_place: Sequence[ExpertLayer] | None = None
        self._close = weakref.finalize(self, fetcher.close)  # a dropped cache must not leave threads behind

    # ---- ahead of time ----------------------------------------------------------------------------

    def prefetch(self, layer: MoELayer, experts: Sequence[int], urgencies: Sequence[float]) -> None:
        """Bring experts that a predictor expects, as far as free slots and slots in transit go: nothing is evicted
        on a guess. `urgencies` are finite; larger is earlier."""
        self._holdings.land_prefetches()
        for expert, urgency in zip(experts, urgencies, strict=True):
            key = layer, expert
            if self.acquirer.is_of_use(key):
                if not self._holdings.claims.without_evicting(key):
                    return
                self.in_flight.start(key, urgency)

    def cancel_prefetches(self) -> None:
        """Drop every prefetch under way."""
        self._holdings.land_prefetches()
        for key in self.in_flight.prefetches():
            self.in_flight.cancel(key)

    # ---- between steps ----------------------------------------------------------------------------

    def resize(self, num_slots: int) -> None:
        """Change the number of slots; what no longer fits is evicted and its memory freed."""
        self.cancel_prefetches()
        num_slots = min(num_slots, self.arena.num_slots)
        self.table.num_transit = min(self._most_transit, num_slots // SLOTS_PER_TRANSIT)
        shape = len(self.store.layers), self.store.num_experts
        self._reallot(resized(self.table.allowed, *shape, num_slots - self.table.num_transit))

    def keep_only(self, wanted: NDArray[np.bool_]) -> None:
        """Free the slots of experts outside `wanted` [L, E], which will not be asked for any more."""
        self._in_place = None
        self.cancel_prefetches()
        for layer, expert in np.argwhere((self.table.slot_of >= 0) & ~wanted):
            self._holdings.claims.evict((MoELayer(int(layer)), int(expert)))

    def rebalance(self) -> None:
        """Give the layers other shares of the slots if recent traffic says that it saves misses."""
        capacity = self.observers.better_quotas()
        if capacity is not None:
            self.cancel_prefetches()
            self._reallot(capacity)

    def _reallot(self, allowed: Capacity) -> None:
        """Other pools; what no longer fits is evicted and its memory freed."""
        self._in_place = None
        self.table.allowed = allowed
        self.observers.resized(allowed)
        for layer, expert in np.argwhere(self.table.in_transit):
            self.arena.release(self._holdings.claims.evict((MoELayer(int(layer)), int(expert))))
        while crowded := self.table.over_capacity():
            victim = self.table.victim(crowded[0], spare_unasked=False)
            assert victim is not None, "resized while a step has experts pinned"
            self.arena.release(self._holdings.claims.evict(victim[0]))

    def close(self) -> None:
        """Stop the reading threads; more than once does no harm."""
        self._close()

    # ---- looking at it ----------------------------------------------------------------------------

    def layers_in_place(self) -> Sequence[ExpertLayer]:
        """[L], if all experts are in slots and none will ever be evicted; else []. The same object until a resize."""
        if not self._holdings.everything_fits or self.num_resident < self.store.num_total:
            return ()
        if self._in_place is None:
            self._in_place = layers_of(self._holdings.weights)
        return self._in_place

    @property
    def num_resident(self) -> int:
        """Experts ready to run."""
        return len(self._holdings.weights)

    @property
    def num_slots(self) -> int:
        """Slots it may use, those in transit included."""
        return self.table.allowed.total + self.table.num_transit

    @property
    def used_bytes(self) -> int:
        """Memory of the slots in use."""
        return self.table.num_owned * self.arena.slot_bytes

    def residency(self) -> Residency:
        """What is in slots now, and what was read to get there."""
        num_bytes, busy_s = self.fetcher.activity()
        return Residency(
            ready=self.table.slot_of >= 0,
            unused=self.table.not_asked_yet.copy(),
            fast_tier="device",
            slow_tier="disk" if self.arena.lands_in_place else "host",
            num_slots=self.num_slots,
            slot_bytes=self.arena.slot_bytes,
            used_bytes=self.used_bytes,
            link_bytes=num_bytes,
            link_busy_s=busy_s,
        )

    def check_integrity(self) -> None:
        """Prove the invariants; AssertionError says which one broke."""
        self._holdings.check_integrity()
