"""ExpertCache: experts in slots, on their way, or waiting; one layer's step at a time.

One thread, the engine's, calls it; the Fetcher's threads only fill memory. Everything the router
chose is pinned until it has run. When the slots do not suffice, the rest waits for a slot to be
released (waves), so no token is dropped and no batch is too wide. Prefetched experts give way to
demanded ones, never the other way round. Knows no tokens and no arithmetic.

Shape alphabet: L layers, E experts per layer, S slots.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from expert_cache.acquisition import Acquisition
from expert_cache.adaptive_quotas import AdaptiveQuotas
from expert_cache.arena import SlotArena
from expert_cache.belady_window import BeladyWindow
from expert_cache.compute import PreparedWeights, in_place
from expert_cache.counters import CacheCounters
from expert_cache.errors import ExpertReadError
from expert_cache.fetch import DEMAND, LATER, Fetcher
from expert_cache.in_flight import START_EARLY_BYTES, InFlight
from expert_cache.live_shadows import LiveShadows
from expert_cache.miss_service import MissService
from expert_cache.policies.policy import Ints, Policy
from expert_cache.pools import resized
from expert_cache.report import Residency
from expert_cache.slot_claims import SlotClaims
from expert_cache.slot_table import Key, SlotTable
from expert_cache.slots import Slots
from expert_cache.store import ExpertStore, ExpertWeights
from expert_cache.streaming import FEWEST_RING_SLOTS, Streaming
from moe_serve_kernels.cpu.expert_layer import ExpertLayer
from moe_serve_kernels.quantized import QuantizedRows

WINDOW_STEPS = 256
"""Steps over which the cache is compared with the best possible one."""
SLOTS_PER_TRANSIT = 8
"""One slot in transit for so many slots: few enough not to be missed by the pools."""


class ExpertCache:
    """Slots for some of a store's experts, kept by a policy."""

    def __init__(
        self,
        store: ExpertStore,
        prepare: Callable[[ExpertWeights], PreparedWeights],
        arena: SlotArena,
        slots: Slots,
        num_transit: int,
        policy: Policy,
        fetcher: Fetcher,
        start_early_bytes: int = START_EARLY_BYTES,
        shadows: LiveShadows | None = None,
        quotas: AdaptiveQuotas | None = None,
        misses: MissService | None = None,
    ) -> None:
        """`num_transit`: slots beside `slots` in which experts arrive before it is decided who stays. `quotas`: who
        solves the layers' shares again, see `rebalance`. `misses`: who leaves missing experts on the host, if anyone.

        `arena` has at least as many slots as the two together; more allow growing later.
        """
        num_layers = len(store.layers)
        self.shadows = shadows
        self.quotas = quotas
        self.misses = misses
        self.store, self.arena, self.policy, self.fetcher = store, arena, policy, fetcher
        self.table = SlotTable(num_layers, store.num_experts, arena.num_slots, slots, num_transit, policy)
        self.counters = CacheCounters(num_layers)
        self._most_transit = num_transit
        self._index = {layer: i for i, layer in enumerate(store.layers)}
        self._weights: dict[Key, PreparedWeights] = {}
        self._in_place: Mapping[int, ExpertLayer] | None = None
        self._streaming = Streaming(store)
        self.in_flight = InFlight(store, prepare, arena, self.table, fetcher, self.counters, start_early_bytes)
        self._claims = SlotClaims(self.table, self.in_flight, self._weights, self.counters, store.expert_bytes)
        self._close = weakref.finalize(self, fetcher.close)  # a dropped cache must not leave threads behind
        self._window = self._new_window(slots)

    # ---- one layer's step -------------------------------------------------------------------------

    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> Acquisition:
        """Pin what is here and start to bring what is not.

        `experts`: distinct, ascending; `counts`: tokens of each. Prefetches for this layer that the
        router did not confirm are cancelled (ExpertFlow's real-time correction).
        """
        index = self._index[layer]
        if self._everything_fits:
            ready = {e: self._weights[index, e] for e in experts if (index, e) in self._weights}
            if len(ready) == len(experts):  # nothing to bring, and nothing will ever be evicted
                self.counters.hits[index] += len(experts)
                return Acquisition(layer, False, ready)
        self._record(index, np.asarray(experts), np.asarray(counts))
        self._land_prefetches()
        wanted = Acquisition(layer, streams=self._streaming.suits(len(experts)))
        for expert in experts:
            weights = self._weights.get((index, expert))
            if weights is None:
                wanted.waiting.append(expert)
            else:
                self._hit((index, expert))
                wanted.ready[expert] = weights
        self.counters.misses[index] += len(wanted.waiting)
        self._window.add(index, np.asarray(experts), len(wanted.ready), self.table.slot_of >= 0)
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
        """Block until something in flight has arrived (then it is in `ready`), failed (`failed`), or at least brought
        what its first product needs (`inputs`)."""
        index = self._index[wanted.layer]
        assert wanted.in_flight, "everything waits for a slot, and nobody will release one"
        start = time.perf_counter()
        self.in_flight.wait((index, expert) for expert in wanted.in_flight)
        self.counters.stall_s[index] += time.perf_counter() - start
        self._collect(wanted)
        for expert in wanted.in_flight:
            if (weights := self.in_flight.inputs((index, expert))) is not None:
                wanted.inputs[expert] = weights
        self._start_waiting(wanted)

    def release(self, wanted: Acquisition, expert: int) -> None:
        """A ready expert has run: its slot may go to one that waits."""
        del wanted.ready[expert]
        if not wanted.is_pinned:
            return
        key = self._index[wanted.layer], expert
        self._unpin(key)
        if self.table.in_transit[key]:
            self._claims.settle(key)
        if wanted.streams:
            self._collect(wanted)
        self._start_waiting(wanted)

    def abandon(self, wanted: Acquisition) -> None:
        """Give everything up: the step that acquired it has failed."""
        index = self._index[wanted.layer]
        wanted.streams = False
        wanted.waiting.clear()
        for expert in list(wanted.ready):
            self.release(wanted, expert)
        for expert in list(wanted.in_flight):
            self._unpin((index, expert))
            self.in_flight.cancel((index, expert))
        wanted.in_flight.clear()
        wanted.inputs.clear()

    def layers_in_place(self) -> Mapping[int, ExpertLayer]:
        """By layer, if all experts are in slots and none will ever be evicted; else {}. The same object until a
        resize."""
        if not self._everything_fits or self.num_resident < self.store.num_total:
            return {}
        if self._in_place is None:
            layers = self.store.layers
            self._in_place = in_place({(layers[i], e): weights for (i, e), weights in self._weights.items()})
        return self._in_place

    # ---- ahead of time ----------------------------------------------------------------------------

    def prefetch(self, layer: int, experts: Sequence[int], urgencies: Sequence[float]) -> None:
        """Bring experts that a predictor expects, as far as free slots and slots in transit go: nothing is evicted
        on a guess. `urgencies` are finite; larger is earlier."""
        self._land_prefetches()
        for expert, urgency in zip(experts, urgencies, strict=True):
            key = self._index[layer], expert
            if self._is_of_use(key):
                if not self._claims.without_evicting(key):
                    return
                self.in_flight.start(key, urgency)

    def cancel_prefetches(self) -> None:
        """Drop every prefetch under way."""
        self._land_prefetches()
        for key in self.in_flight.prefetches():
            self.in_flight.cancel(key)

    def resize(self, num_slots: int) -> None:
        """Change the number of slots, between steps; what no longer fits is evicted and its memory freed."""
        self.cancel_prefetches()
        num_slots = min(num_slots, self.arena.num_slots)
        self.table.num_transit = min(self._most_transit, num_slots // SLOTS_PER_TRANSIT)
        shape = len(self.store.layers), self.store.num_experts
        self._reallot(resized(self.table.allowed, *shape, num_slots - self.table.num_transit))

    def keep_only(self, wanted: NDArray[np.bool_]) -> None:
        """Between steps: free the slots of experts outside `wanted` [L, E], which will not be asked for any more."""
        self._in_place = None
        self.cancel_prefetches()
        for index, expert in np.argwhere((self.table.slot_of >= 0) & ~wanted):
            self._claims.evict((int(index), int(expert)))

    def rebalance(self) -> None:
        """Between steps: give the layers other shares of the slots if recent traffic says that it saves misses."""
        quotas = self.table.allowed.quotas
        if self.quotas is not None and self.quotas.is_due and quotas is not None:
            slots = self.quotas.proposal(quotas)
            if slots is not None:
                self.cancel_prefetches()
                self._reallot(slots)

    def _reallot(self, allowed: Slots) -> None:
        """Other pools; what no longer fits is evicted and its memory freed."""
        self._in_place = None
        self.table.allowed = allowed
        self._window = self._new_window(self.table.allowed)
        if self.shadows is not None:
            self.shadows.resize(self.table.allowed)
        for index, expert in np.argwhere(self.table.in_transit):
            self.arena.release(self._claims.evict((int(index), int(expert))))
        while crowded := self.table.over_capacity():
            victim = self.table.victim(crowded[0], spare_unused=False)
            assert victim is not None, "resized while a step has experts pinned"
            self.arena.release(self._claims.evict(victim[0]))

    # ---- looking at it ----------------------------------------------------------------------------

    @property
    def num_resident(self) -> int:
        """Experts ready to run."""
        return len(self._weights)

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
            unused=self.table.unused.copy(),
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
        self.table.check_integrity()
        self.in_flight.check_integrity()
        ready = {(int(i), int(e)) for i, e in np.argwhere(self.table.slot_of >= 0)}
        assert set(self._weights) == ready, "weights and slots disagree"
        for key, weights in self._weights.items():
            start = self.arena.tensor(int(self.table.slot_of[key])).data_ptr()
            down = weights.down.codes if isinstance(weights.down, QuantizedRows) else weights.down
            inside = start <= down.data_ptr() < start + self.arena.slot_bytes
            assert inside or self.store.is_copied, "weights lie outside their slot"

    def close(self) -> None:
        """Stop the reading threads; more than once does no harm."""
        self._close()

    @property
    def belady_gap_frac(self) -> float | None:
        """Of the misses of the last full window of events, the fraction that perfect foresight would have avoided."""
        last = self._window.last
        # The window after a resize starts as if the cache were empty, so the bound may lie below what was reached.
        return None if last is None else max(0.0, last.avoidable_frac)

    @property
    def _everything_fits(self) -> bool:
        return self.table.allowed.total >= self.store.num_total

    @property
    def shadow_hits(self) -> dict[str, int]:
        """What other policies would have hit so far, by name."""
        return {} if self.shadows is None else self.shadows.hits()

    # ---- inside -----------------------------------------------------------------------------------

    def _new_window(self, slots: Slots) -> BeladyWindow:
        num_layers, num_experts = len(self.store.layers), self.store.num_experts
        return BeladyWindow(slots, num_layers, num_experts, WINDOW_STEPS * num_layers)

    def _record(self, index: int, experts: Ints, counts: Ints) -> None:
        """Tell the policy, and those that might have been chosen instead."""
        self.policy.record(index, experts, counts, None)
        if self.shadows is not None:
            self.shadows.event(index, experts, counts)
        if self.quotas is not None and self.table.allowed.quotas is not None:
            self.quotas.add(index, experts)

    def _hit(self, key: Key) -> None:
        self.table.pins[key] += 1
        self.counters.hits[key[0]] += 1
        if self.table.unused[key]:
            self.table.unused[key] = False
            self.counters.prefetch_hits[key[0]] += 1

    def _unpin(self, key: Key) -> None:
        assert self.table.pins[key] > 0
        self.table.pins[key] -= 1

    def _correct_prefetches(self, index: int, wanted: Acquisition) -> None:
        """Promote what the router confirmed; cancel, or let go from transit, what it did not."""
        for key in self.in_flight.of_layer(index):
            if key[1] in wanted.waiting:
                wanted.waiting.remove(key[1])
                wanted.in_flight.add(key[1])
                self.table.pins[key] += 1
                self.counters.late_prefetches[index] += 1
                self.in_flight.promote(key)
            else:
                self.in_flight.cancel(key)
        for expert in np.flatnonzero(self.table.in_transit[index] & self.table.unused[index]):
            self._claims.evict((index, int(expert)))

    def _bring_later(self, key: Key) -> None:
        """An expert computed on the host comes while the link is idle, if it is worth more than the least of its pool:
        otherwise what is resident could never change."""
        if self._is_of_use(key) and self._claims.if_worth_it(key):
            self.in_flight.start(key, LATER)

    def _start_waiting(self, wanted: Acquisition) -> None:
        """Give slots to waiting experts as long as there are any."""
        index = self._index[wanted.layer]
        while wanted.waiting and self._claims.for_demand((index, wanted.waiting[0]), self._may_evict(wanted)):
            expert = wanted.waiting.popleft()
            self.table.pins[index, expert] += 1
            wanted.in_flight.add(expert)
            self.in_flight.start((index, expert), DEMAND)
        if wanted.streams and not wanted.waiting:
            self._read_ahead(index)

    def _may_evict(self, wanted: Acquisition) -> bool:
        """A stream stays in its ring, if there is one, as long as something in it moves."""
        is_moving = bool(wanted.ready or wanted.in_flight)
        return not (wanted.streams and is_moving and self.table.num_transit >= FEWEST_RING_SLOTS)

    def _read_ahead(self, index: int) -> None:
        """The stream goes on into the next layers, as far as there are slots."""
        for distance, key in enumerate(self._streaming.ahead(index)):
            if key in self._weights or key in self.in_flight:
                continue
            if not self._claims.without_evicting(key):
                return
            self.in_flight.start(key, -float(distance))

    def _is_of_use(self, key: Key) -> bool:
        """Bringing this expert ahead of time can save reading it later."""
        if key in self._weights or key in self.in_flight:
            return False
        return self.misses is None or not self.misses.stays(self.store.layers[key[0]], key[1])

    def _leave_on_host(self, misses: MissService, wanted: Acquisition, count_of: dict[int, int]) -> None:
        """Some of what waits for a slot is computed where it is."""
        missing = list(wanted.waiting)
        wanted.on_host = misses.on_host(wanted.layer, missing, [count_of[e] for e in missing], len(wanted.in_flight))
        for expert in wanted.on_host:
            wanted.waiting.remove(expert)
        self.counters.host_runs[self._index[wanted.layer]] += len(wanted.on_host)

    def _order_stream(self, index: int, wanted: Acquisition) -> None:
        """Whoever holds a slot of the ring comes last in `ready`: it is run first. The rest as the file has it."""
        travels = self.table.in_transit[index]
        wanted.ready = dict(sorted(wanted.ready.items(), key=lambda item: bool(travels[item[0]])))
        wanted.waiting = deque(self._streaming.in_file_order(index, wanted.waiting))

    def _collect(self, wanted: Acquisition) -> None:
        """Book what has arrived by now."""
        for expert in list(wanted.in_flight):
            if self.in_flight.is_done((self._index[wanted.layer], expert)):
                self._arrive(wanted, expert)

    def _arrive(self, wanted: Acquisition, expert: int) -> None:
        """Book an expert that was in flight."""
        wanted.in_flight.remove(expert)
        wanted.inputs.pop(expert, None)
        outcome = self._land((self._index[wanted.layer], expert))
        if isinstance(outcome, ExpertReadError):
            wanted.failed[expert] = outcome
        else:
            wanted.ready[expert] = outcome

    def _land_prefetches(self) -> None:
        """Book prefetches that have finished. A failed one is forgotten: if the router wants it, it is read again."""
        for key in self.in_flight.prefetches():
            if self.in_flight.is_done(key) and not isinstance(self._land(key), ExpertReadError):
                self.table.unused[key] = True

    def _land(self, key: Key) -> PreparedWeights | ExpertReadError:
        outcome = self.in_flight.land(key)
        if not isinstance(outcome, ExpertReadError):
            self._weights[key] = outcome
        return outcome
