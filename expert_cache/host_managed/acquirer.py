"""Acquirer: one layer's experts for one step: what is in slots is pinned, what is not is brought or left on the host.

Everything the router chose is pinned until it has run. When the slots do not suffice, the rest waits for a slot to be
released (waves), so no token is dropped and no batch is too wide. Prefetched experts give way to demanded ones, never
the other way round.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from expert_cache.acquisition import Acquisition
from expert_cache.errors import ExpertReadError
from expert_cache.host_compute.miss_choice import MissChoice
from expert_cache.host_managed.holdings import Holdings
from expert_cache.host_managed.observers import Observers
from expert_cache.host_managed.slot_table import Key
from expert_cache.host_managed.streaming import FEWEST_RING_SLOTS, Streaming
from expert_cache.storage.fetch import DEMAND, LATER


class Acquirer:
    """Acquires and releases a Stock's experts."""

    def __init__(self, stock: Holdings, observers: Observers, misses: MissChoice | None) -> None:
        """`misses`: who leaves missing experts on the host, if anyone."""
        self._stock, self._observers, self.misses = stock, observers, misses
        self._table, self._in_flight, self._claims = stock.table, stock.in_flight, stock.claims
        self._counters, self._weights, self._index_of = stock.counters, stock.weights, stock.index_of
        self.streaming = Streaming(stock.store)

    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> Acquisition:
        """See ExpertCache."""
        index = self._index_of[layer]
        if self._stock.everything_fits:
            ready = {e: self._weights[index, e] for e in experts if (index, e) in self._weights}
            if len(ready) == len(experts):  # nothing to bring, and nothing will ever be evicted
                self._counters.hits[index] += len(experts)
                return Acquisition(layer, False, ready)
        self._observers.record(index, np.asarray(experts), np.asarray(counts))
        self._stock.land_prefetches()
        wanted = self._divide(layer, experts)
        self._observers.found(index, np.asarray(experts), len(wanted.ready), self._table.slot_of >= 0)
        self._correct_prefetches(index, wanted)
        if wanted.streams:
            self._order_stream(index, wanted)
        elif self.misses is not None and wanted.waiting:
            self._leave_on_host(self.misses, wanted, dict(zip(experts, counts, strict=True)))
        self._start_waiting(wanted)
        for expert in wanted.on_host:
            self._bring_later((index, expert))
        return wanted

    def wait(self, wanted: Acquisition) -> None:
        """See ExpertCache."""
        index = self._index_of[wanted.layer]
        assert wanted.in_flight, "everything waits for a slot, and nobody will release one"
        start = time.perf_counter()
        self._in_flight.wait((index, expert) for expert in wanted.in_flight)
        self._counters.stall_s[index] += time.perf_counter() - start
        self._collect(wanted)
        for expert in wanted.in_flight:
            if (weights := self._in_flight.inputs((index, expert))) is not None:
                wanted.inputs[expert] = weights
        self._start_waiting(wanted)

    def release(self, wanted: Acquisition, expert: int) -> None:
        """See ExpertCache."""
        del wanted.ready[expert]
        if not wanted.is_pinned:
            return
        key = self._index_of[wanted.layer], expert
        self._unpin(key)
        if self._table.in_transit[key]:
            self._claims.settle(key)
        if wanted.streams:
            self._collect(wanted)
        self._start_waiting(wanted)

    def abandon(self, wanted: Acquisition) -> None:
        """See ExpertCache."""
        index = self._index_of[wanted.layer]
        wanted.streams = False
        wanted.waiting.clear()
        for expert in list(wanted.ready):
            self.release(wanted, expert)
        for expert in list(wanted.in_flight):
            self._unpin((index, expert))
            self._in_flight.cancel((index, expert))
        wanted.in_flight.clear()
        wanted.inputs.clear()

    def is_of_use(self, key: Key) -> bool:
        """Bringing this expert ahead of time can save reading it later."""
        if self._stock.has(key):
            return False
        return self.misses is None or not self.misses.stays(self._stock.store.layers[key[0]], key[1])

    def _divide(self, layer: int, experts: Sequence[int]) -> Acquisition:
        """Into those that are ready, which are pinned, and those that wait."""
        index = self._index_of[layer]
        wanted = Acquisition(layer, streams=self.streaming.suits(len(experts)))
        for expert in experts:
            weights = self._weights.get((index, expert))
            if weights is None:
                wanted.waiting.append(expert)
            else:
                self._hit((index, expert))
                wanted.ready[expert] = weights
        self._counters.misses[index] += len(wanted.waiting)
        return wanted

    def _hit(self, key: Key) -> None:
        self._table.pins[key] += 1
        self._counters.hits[key[0]] += 1
        if self._table.unused[key]:
            self._table.unused[key] = False
            self._counters.prefetch_hits[key[0]] += 1

    def _unpin(self, key: Key) -> None:
        assert self._table.pins[key] > 0
        self._table.pins[key] -= 1

    def _correct_prefetches(self, index: int, wanted: Acquisition) -> None:
        """Promote what the router confirmed; cancel, or let go from transit, what it did not."""
        for key in self._in_flight.of_layer(index):
            if key[1] in wanted.waiting:
                wanted.waiting.remove(key[1])
                wanted.in_flight.add(key[1])
                self._table.pins[key] += 1
                self._counters.late_prefetches[index] += 1
                self._in_flight.promote(key)
            else:
                self._in_flight.cancel(key)
        for expert in np.flatnonzero(self._table.in_transit[index] & self._table.unused[index]):
            self._claims.evict((index, int(expert)))

    def _bring_later(self, key: Key) -> None:
        """An expert computed on the host comes while the link is idle, if it is worth more than the least of its pool:
        otherwise what is resident could never change."""
        if self.is_of_use(key) and self._claims.if_worth_it(key):
            self._in_flight.start(key, LATER)

    def _start_waiting(self, wanted: Acquisition) -> None:
        """Give slots to waiting experts as long as there are any."""
        index = self._index_of[wanted.layer]
        while wanted.waiting and self._claims.for_demand((index, wanted.waiting[0]), self._may_evict(wanted)):
            expert = wanted.waiting.popleft()
            self._table.pins[index, expert] += 1
            wanted.in_flight.add(expert)
            self._in_flight.start((index, expert), DEMAND)
        if wanted.streams and not wanted.waiting:
            self._read_ahead(index)

    def _may_evict(self, wanted: Acquisition) -> bool:
        """A stream stays in its ring, if there is one, as long as something in it moves."""
        is_moving = bool(wanted.ready or wanted.in_flight)
        return not (wanted.streams and is_moving and self._table.num_transit >= FEWEST_RING_SLOTS)

    def _read_ahead(self, index: int) -> None:
        """The stream goes on into the next layers, as far as there are slots."""
        for distance, key in enumerate(self.streaming.ahead(index)):
            if self._stock.has(key):
                continue
            if not self._claims.without_evicting(key):
                return
            self._in_flight.start(key, -float(distance))

    def _leave_on_host(self, misses: MissChoice, wanted: Acquisition, count_of: dict[int, int]) -> None:
        """Some of what waits for a slot is computed where it is."""
        missing = list(wanted.waiting)
        wanted.on_host = misses.on_host(wanted.layer, missing, [count_of[e] for e in missing], len(wanted.in_flight))
        for expert in wanted.on_host:
            wanted.waiting.remove(expert)
        self._counters.host_runs[self._index_of[wanted.layer]] += len(wanted.on_host)

    def _order_stream(self, index: int, wanted: Acquisition) -> None:
        """Whoever holds a slot of the ring comes last in `ready`: it is run first. The rest as the file has it."""
        travels = self._table.in_transit[index]
        wanted.ready = dict(sorted(wanted.ready.items(), key=lambda item: bool(travels[item[0]])))
        wanted.waiting = deque(self.streaming.in_file_order(index, wanted.waiting))

    def _collect(self, wanted: Acquisition) -> None:
        """Book what has arrived by now."""
        for expert in list(wanted.in_flight):
            if self._in_flight.is_done((self._index_of[wanted.layer], expert)):
                self._arrive(wanted, expert)

    def _arrive(self, wanted: Acquisition, expert: int) -> None:
        """Book an expert that was in flight."""
        wanted.in_flight.remove(expert)
        wanted.inputs.pop(expert, None)
        outcome = self._stock.land((self._index_of[wanted.layer], expert))
        if isinstance(outcome, ExpertReadError):
            wanted.failed[expert] = outcome
        else:
            wanted.ready[expert] = outcome
