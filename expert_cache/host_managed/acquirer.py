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

from expert_cache.host_compute.miss_choice import MissChoice
from expert_cache.host_managed.acquisition import Acquisition
from expert_cache.host_managed.holdings import Holdings
from expert_cache.host_managed.streaming import FEWEST_RING_SLOTS, Streaming
from expert_cache.simulation.observers import Observers
from expert_cache.storage import DEMAND, LATER, ExpertReadError
from predictors.shape import Key, MoELayer


class Acquirer:
    """Acquires and releases Holdings' experts."""

    def __init__(self, holdings: Holdings, observers: Observers, misses: MissChoice | None) -> None:
        """`misses`: decides which missing experts stay on the host; None: none does."""
        self._holdings, self._observers, self.misses = holdings, observers, misses
        self._table, self._in_flight, self._claims = holdings.table, holdings.in_flight, holdings.claims
        self._counters, self._weights = holdings.counters, holdings.weights
        self.streaming = Streaming(holdings.store)

    def acquire(self, layer: MoELayer, experts: Sequence[int], counts: Sequence[int]) -> Acquisition:
        """Pin what is here and start to bring what is not.

        `experts`: distinct, ascending; `counts`: tokens of each. Prefetches for this layer that the
        router did not confirm are cancelled (ExpertFlow's real-time correction).
        """
        if self._holdings.everything_fits:
            ready = {e: self._weights[layer, e] for e in experts if (layer, e) in self._weights}
            if len(ready) == len(experts):  # nothing to bring, and nothing will ever be evicted
                self._counters.hits[layer] += len(experts)
                return Acquisition(layer, False, ready)
        self._observers.record(layer, np.asarray(experts), np.asarray(counts))
        self._holdings.land_prefetches()
        wanted = self._divide(layer, experts)
        self._observers.found(layer, np.asarray(experts), len(wanted.ready), self._table.slot_of >= 0)
        self._correct_prefetches(layer, wanted)
        if wanted.streams:
            self._order_stream(layer, wanted)
        elif self.misses is not None and wanted.waiting:
            self._leave_on_host(self.misses, wanted, dict(zip(experts, counts, strict=True)))
        self._start_waiting(wanted)
        for expert in wanted.on_host:
            self._bring_later((layer, expert))
        return wanted

    def wait(self, wanted: Acquisition) -> None:
        """Block until something in flight has arrived (then it is in `ready`), failed (`failed`), or at least brought
        what its first product needs (`inputs`)."""
        layer = wanted.layer
        assert wanted.in_flight, "everything waits for a slot, and no slot will be released"
        start = time.perf_counter()
        self._in_flight.wait((layer, expert) for expert in wanted.in_flight)
        self._counters.stall_s[layer] += time.perf_counter() - start
        self._collect(wanted)
        for expert in wanted.in_flight:
            if (weights := self._in_flight.inputs((layer, expert))) is not None:
                wanted.inputs[expert] = weights
        self._start_waiting(wanted)

    def release(self, wanted: Acquisition, expert: int) -> None:
        """A ready expert has run: its slot may go to one that waits."""
        del wanted.ready[expert]
        if not wanted.is_pinned:
            return
        key = wanted.layer, expert
        self._unpin(key)
        if self._table.in_transit[key]:
            self._claims.settle(key)
        if wanted.streams:
            self._collect(wanted)
        self._start_waiting(wanted)

    def abandon(self, wanted: Acquisition) -> None:
        """Give everything up: the step that acquired it has failed."""
        layer = wanted.layer
        wanted.streams = False
        wanted.waiting.clear()
        for expert in list(wanted.ready):
            self.release(wanted, expert)
        for expert in list(wanted.in_flight):
            self._unpin((layer, expert))
            self._in_flight.cancel((layer, expert))
        wanted.in_flight.clear()
        wanted.inputs.clear()

    def is_of_use(self, key: Key) -> bool:
        """Bringing this expert ahead of time can save reading it later."""
        if self._holdings.has(key):
            return False
        return self.misses is None or not self.misses.stays(*key)

    def _divide(self, layer: MoELayer, experts: Sequence[int]) -> Acquisition:
        """Into those that are ready, which are pinned, and those that wait."""
        wanted = Acquisition(layer, streams=self.streaming.suits(len(experts)))
        for expert in experts:
            weights = self._weights.get((layer, expert))
            if weights is None:
                wanted.waiting.append(expert)
            else:
                self._hit((layer, expert))
                wanted.ready[expert] = weights
        self._counters.misses[layer] += len(wanted.waiting)
        return wanted

    def _hit(self, key: Key) -> None:
        self._table.pins[key] += 1
        self._counters.hits[key[0]] += 1
        if self._table.not_asked_yet[key]:
            self._table.not_asked_yet[key] = False
            self._counters.prefetch_hits[key[0]] += 1

    def _unpin(self, key: Key) -> None:
        assert self._table.pins[key] > 0
        self._table.pins[key] -= 1

    def _correct_prefetches(self, layer: MoELayer, wanted: Acquisition) -> None:
        """Promote what the router confirmed; cancel, or let go from transit, what it did not."""
        for key in self._in_flight.of_layer(layer):
            if key[1] in wanted.waiting:
                wanted.waiting.remove(key[1])
                wanted.in_flight.add(key[1])
                self._table.pins[key] += 1
                self._counters.late_prefetches[layer] += 1
                self._in_flight.promote(key)
            else:
                self._in_flight.cancel(key)
        for expert in np.flatnonzero(self._table.in_transit[layer] & self._table.not_asked_yet[layer]):
            self._claims.evict((layer, int(expert)))

    def _bring_later(self, key: Key) -> None:
        """An expert computed on the host comes while the link is idle, if it is worth more than the least of its pool:
        otherwise what is resident could never change."""
        if self.is_of_use(key) and self._claims.if_worth_it(key):
            self._in_flight.start(key, LATER)

    def _start_waiting(self, wanted: Acquisition) -> None:
        """Give slots to waiting experts as long as there are any."""
        layer = wanted.layer
        while wanted.waiting and self._claims.for_demand((layer, wanted.waiting[0]), self._may_evict(wanted)):
            expert = wanted.waiting.popleft()
            self._table.pins[layer, expert] += 1
            wanted.in_flight.add(expert)
            self._in_flight.start((layer, expert), DEMAND)
        if wanted.streams and not wanted.waiting:
            self._read_ahead(layer)

    def _may_evict(self, wanted: Acquisition) -> bool:
        """A stream stays in its ring, if there is one, as long as something in it moves."""
        is_moving = bool(wanted.ready or wanted.in_flight)
        return not (wanted.streams and is_moving and self._table.num_transit >= FEWEST_RING_SLOTS)

    def _read_ahead(self, layer: MoELayer) -> None:
        """The stream goes on into the next layers, as far as there are slots."""
        for distance, key in enumerate(self.streaming.ahead(layer)):
            if self._holdings.has(key):
                continue
            if not self._claims.without_evicting(key):
                return
            self._in_flight.start(key, -float(distance))

    def _leave_on_host(self, misses: MissChoice, wanted: Acquisition, count_of: dict[int, int]) -> None:
        """Leave some of the experts that wait for a slot on the host, to be computed there."""
        missing = list(wanted.waiting)
        wanted.on_host = misses.on_host(wanted.layer, missing, [count_of[e] for e in missing], len(wanted.in_flight))
        for expert in wanted.on_host:
            wanted.waiting.remove(expert)
        self._counters.host_runs[wanted.layer] += len(wanted.on_host)

    def _order_stream(self, layer: MoELayer, wanted: Acquisition) -> None:
        """Experts in transit slots go last, because next_ready() takes from the end. The rest as the file has it."""
        travels = self._table.in_transit[layer]
        wanted.ready = dict(sorted(wanted.ready.items(), key=lambda item: bool(travels[item[0]])))
        wanted.waiting = deque(self.streaming.in_file_order(layer, wanted.waiting))

    def _collect(self, wanted: Acquisition) -> None:
        """Book what has arrived by now."""
        for expert in list(wanted.in_flight):
            if self._in_flight.is_done((wanted.layer, expert)):
                self._arrive(wanted, expert)

    def _arrive(self, wanted: Acquisition, expert: int) -> None:
        """Book an expert that was in flight."""
        wanted.in_flight.remove(expert)
        wanted.inputs.pop(expert, None)
        outcome = self._holdings.land((wanted.layer, expert))
        if isinstance(outcome, ExpertReadError):
            wanted.failed[expert] = outcome
        else:
            wanted.ready[expert] = outcome
