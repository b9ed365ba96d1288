"""SlotClaims: how an expert comes by a slot, and who loses one for it.

Between the bookkeeping (SlotTable) and the reading (InFlight). Knows which claims go before which; knows no steps.
"""

from __future__ import annotations

from expert_cache.host_managed.in_flight import InFlight
from expert_cache.host_managed.slot_table import SlotTable
from expert_cache.report import CacheCounters
from expert_cache.running import PreparedWeights
from predictors.shape import Key


class SlotClaims:
    """Claims of demands, guesses and experts in transit on one table's slots."""

    def __init__(
        self,
        table: SlotTable,
        in_flight: InFlight,
        weights: dict[Key, PreparedWeights],
        counters: CacheCounters,
        expert_bytes: int,
    ) -> None:
        """`weights`: of the experts that are ready; those that lose their slot are taken out."""
        self._table, self._in_flight, self._weights = table, in_flight, weights
        self._counters, self._expert_bytes = counters, expert_bytes

    def for_demand(self, key: Key, may_evict: bool) -> bool:
        """Take a slot, if need be at the expense of others: of a prefetch under way, by eviction, of an unused
        prefetch."""
        if self.without_evicting(key):
            return True
        rivals = [k for k in self._in_flight.prefetches() if self._competes(k, key)]
        if rivals:
            self._in_flight.cancel(self._in_flight.least_urgent(rivals))
            return self.without_evicting(key)
        return may_evict and any(self._by_evicting(key, spare_unasked) for spare_unasked in (True, False))

    def without_evicting(self, key: Key) -> bool:
        """Take a free slot, of the pool or in transit."""
        if self._table.has_room(key):
            self._table.take(key)
        elif self._table.has_transit:
            self._table.take(key, transit=True)
        else:
            return False
        return True

    def if_worth_it(self, key: Key) -> bool:
        """Take a slot of the pool if the policy values this expert more than the least in it."""
        if not self._make_room(key):
            return False
        self._table.take(key)
        return True

    def settle(self, key: Key) -> None:
        """An expert in transit has been used: it stays if it is worth more than the least of its pool."""
        if self._table.pins[key] > 0:
            return
        if self._make_room(key):
            self._table.admit(key)
        else:
            self.evict(key)

    def evict(self, victim: Key) -> int:
        """Free the slot of a ready expert; returns which."""
        self._counters.evictions[victim[0]] += 1
        if self._table.not_asked_yet[victim]:
            self._counters.wasted_bytes[victim[0]] += self._expert_bytes
        del self._weights[victim]
        return self._table.evict(victim)

    def _make_room(self, key: Key) -> bool:
        """The pool of an expert has a slot for it, or gives up one that is worth less."""
        if self._table.has_room(key):
            return True
        victim = self._table.victim(key[0], spare_unasked=True)
        if victim is None or self._table.value(key) <= victim[1]:
            return False
        self.evict(victim[0])
        return True

    def _by_evicting(self, key: Key, spare_unasked: bool) -> bool:
        victim = self._table.victim(key[0], spare_unasked)
        if victim is None:
            return False
        self.evict(victim[0])
        self._table.take(key)
        return True

    def _competes(self, prefetched: Key, key: Key) -> bool:
        """Cancelling a prefetch would make a slot free for `key`."""
        return bool(self._table.in_transit[prefetched]) or self._table.same_pool(prefetched[0], key[0])
