"""InFlight: experts on their way into slots, each with a slot of the table taken for it, and the books about them.

Knows fetches, slots and bytes; knows no steps, no policy, and not who asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from expert_cache.host_managed.slot_table import SlotTable
from expert_cache.report import CacheCounters
from expert_cache.running import PreparedWeights
from expert_cache.storage import (
    DEMAND,
    ExpertReadError,
    ExpertStore,
    ExpertWeights,
    Fetch,
    Fetcher,
    SlotArena,
    views_in,
)
from predictors.shape import Key, MoELayer

START_EARLY_BYTES = 4 << 20
"""From this size on, an expert's first product is worth starting while the down projection is being read."""


class InFlight:
    """One Fetch for each slot that is taken and not ready."""

    def __init__(
        self,
        store: ExpertStore,
        prepare: Callable[[ExpertWeights], PreparedWeights],
        arena: SlotArena,
        table: SlotTable,
        fetcher: Fetcher,
        counters: CacheCounters,
        start_early_bytes: int,
    ) -> None:
        self._store, self._prepare, self._arena, self._table = store, prepare, arena, table
        self._fetcher, self._counters = fetcher, counters
        self._fetches: dict[Key, Fetch] = {}
        in_place = arena.lands_in_place and not store.is_copied
        self._starts_early = in_place and store.expert_bytes >= start_early_bytes
        self._early: dict[Key, PreparedWeights] = {}
        """Weights of fetches whose first product may have started."""

    def __contains__(self, key: Key) -> bool:
        return key in self._fetches

    def of_layer(self, layer: MoELayer) -> list[Key]:
        return [key for key in self._fetches if key[0] == layer]

    def prefetches(self) -> list[Key]:
        """The reads that no router has asked for yet."""
        return [key for key, fetch in self._fetches.items() if fetch.urgency < DEMAND]

    def least_urgent(self, keys: Iterable[Key]) -> Key:
        return min(keys, key=lambda key: self._fetches[key].urgency)

    def start(self, key: Key, urgency: float) -> None:
        """Begin to fill the slot that was taken for an expert."""
        memory = self._arena.landing(self._table.taken[key])
        fetch = self._fetches[key] = Fetch.of(self._store, key, memory, urgency)
        self._fetcher.submit(fetch)

    def promote(self, key: Key) -> None:
        """A prefetch has been asked for."""
        self._fetcher.promote(self._fetches[key])

    def is_done(self, key: Key) -> bool:
        """Read, or failed: it can land."""
        return self._fetches[key].is_done

    def wait(self, keys: Iterable[Key]) -> None:
        """Block until one of these is done, or its first product can start."""
        fetches = [(key, self._fetches[key]) for key in keys]
        self._fetcher.wait_until(lambda: any(fetch.is_done or self._can_start(key, fetch) for key, fetch in fetches))

    def inputs(self, key: Key) -> PreparedWeights | None:
        """Weights whose gate and up are here, while down is still being read; told once, where it is worth it."""
        if not self._can_start(key, self._fetches[key]):
            return None
        weights = self._early[key] = self._weights_in(key)
        return weights

    def land(self, key: Key) -> PreparedWeights | ExpertReadError:
        """Book a fetch that is done: its expert is ready, or its slot free again."""
        fetch = self._fetches.pop(key)
        early = self._early.pop(key, None)
        self._count_bytes(key, fetch)
        if fetch.error is not None:
            self._counters.read_errors[key[0]] += 1
            self._table.pins[key] = 0
            self._drop(key)
            return fetch.error
        self._arena.landed(self._table.taken[key])
        weights = early or self._weights_in(key)
        self._table.make_ready(key)
        return weights

    def cancel(self, key: Key) -> None:
        """Stop a fetch and free its slot."""
        fetch = self._fetches.pop(key)
        self._early.pop(key, None)
        self._fetcher.cancel(fetch)
        self._count_bytes(key, fetch)
        self._counters.wasted_bytes[key[0]] += fetch.num_bytes_read
        self._drop(key)

    def check_integrity(self) -> None:
        """Prove the invariants; AssertionError says which one broke."""
        assert set(self._table.taken) == set(self._fetches), "a fetch has no slot, or a slot no fetch"
        assert set(self._early) <= set(self._fetches), "an early start outlived its fetch"

    def _can_start(self, key: Key, fetch: Fetch) -> bool:
        """Gate and up have arrived, no early start is announced yet, and the rest is slow enough for one to pay."""
        worthwhile = self._starts_early and key not in self._early
        return worthwhile and fetch.num_inputs_missing == 0 and fetch.error is None

    def _weights_in(self, key: Key) -> PreparedWeights:
        """The weights of an expert that lies, or will lie, in the slot taken for it."""
        reads = self._store.reads(*key)
        memory = self._arena.tensor(self._table.taken[key])
        with self._arena.preparing():
            return self._prepare(self._store.assemble(key, views_in(memory, reads)))

    def _drop(self, key: Key) -> None:
        """An expert will not arrive: its slot is free again."""
        self._arena.dropped(self._table.taken[key])
        self._table.untake(key)

    def _count_bytes(self, key: Key, fetch: Fetch) -> None:
        bytes_of = self._counters.demand_bytes if fetch.urgency == DEMAND else self._counters.prefetch_bytes
        bytes_of[key[0]] += fetch.num_bytes_read
