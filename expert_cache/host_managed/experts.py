"""HostManagedExperts: runs a layer's experts as the host's cache brings them.

Runs the experts that are ready while the others are being read, then each as it arrives. Beside the cache it has who
advises what to bring ahead of time, who computes what the cache leaves on the host, and who watches over the memory.
Knows nothing of models, requests or routers.

Shape alphabet: T tokens, H hidden, K choices per token, P = T * K pairs, L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from expert_cache.host_compute.host_experts import HostExperts, HostRun
from expert_cache.host_managed.acquisition import Acquisition
from expert_cache.host_managed.cache import ExpertCache
from expert_cache.host_managed.memory_guard import MemoryGuard
from expert_cache.prefetch import Advisor, PrefetchAudit
from expert_cache.report import ExpertReport, Residency
from expert_cache.running import (
    ExpertCompute,
    InPlaceExperts,
    Plan,
    Regrouped,
    RegroupedExperts,
    ResizeError,
    Work,
    nothing,
)
from expert_cache.simulation.capacity import least_mib, slots_in
from expert_cache.storage import ExpertReadError
from moe_serve_kernels.cpu.expert_mlp import StartedMLP
from predictors.shape import MoELayer


class LayerObserver(Protocol[Plan]):
    """Is told of each layer's routes as they are chosen, before anything is evicted for them."""

    def begin_step(self, plan: Plan) -> None:
        """The next layers are those of `plan`."""
        ...

    def on_layer(self, layer: MoELayer, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        """ids [T, K] int64; hidden [T, H]."""
        ...


class HostManagedExperts(RegroupedExperts[Plan]):
    """Experts in the slots of an ExpertCache, or on their way into them."""

    reads_can_fail = True

    def __init__(
        self,
        cache: ExpertCache,
        compute: ExpertCompute,
        advisor: Advisor | None = None,
        audit: PrefetchAudit | None = None,
        host: HostExperts | None = None,
        observer: LayerObserver[Plan] | None = None,
        guard: MemoryGuard | None = None,
        slot_bytes: int | None = None,
    ) -> None:
        """`advisor`: whose expectations are brought ahead of time; None: only what the router asks for.
        `audit`: decides whether that pays; None: always. `host`: computes what the cache leaves on the host.
        `guard`: shrinks the cache where memory is short. `slot_bytes`: what a slot takes of the budget in `resize`."""
        super().__init__(cache.store, compute, cache.counters)
        self.cache = cache
        self.advisor = advisor
        self.audit = audit
        self.observer = observer
        self._host = host
        self._guard = guard
        self._slot_bytes = slot_bytes or cache.arena.slot_bytes
        self._acquirer = cache.acquirer
        self._in_place: InPlaceExperts | None = None
        self._failed_rows: dict[int, ExpertReadError] = {}

    # ---- one step ---------------------------------------------------------------------------------

    def begin_step(self, plan: Plan) -> None:
        """See Experts."""
        if self.observer is not None:
            self.observer.begin_step(plan)

    def in_place(self) -> InPlaceExperts | None:
        """All experts, once all are in slots for good, unless the routes of each layer have to be told."""
        if not self.compute.runs_layers or self.observer is not None or self.advisor is not None:
            return None
        layers = self.cache.layers_in_place()
        if not layers:
            self._in_place = None
        elif self._in_place is None or self._in_place.layers is not layers:
            self._in_place = InPlaceExperts(layers, self.compute.activation, self.routes, self.usage, self.counters)
        return self._in_place

    def run(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, meanwhile: Work = nothing
    ) -> torch.Tensor:
        """See Experts."""
        if self.audit is not None and layer == self.store.layers[0]:
            self.audit.begin(len(hidden))
        if self.observer is not None:
            self.observer.on_layer(layer, ids, hidden)
        out = super().run(layer, hidden, ids, weights, meanwhile)
        if self.audit is not None and layer == self.store.layers[-1]:
            self.audit.end()
        return out

    def take_failures(self) -> Mapping[int, ExpertReadError]:
        """See Experts."""
        failures, self._failed_rows = self._failed_rows, {}
        return failures

    def _fill(
        self, layer: MoELayer, hidden: torch.Tensor, groups: Regrouped, out: torch.Tensor, meanwhile: Work
    ) -> None:
        wanted = self._acquirer.acquire(layer, groups.experts, groups.counts)
        try:
            if self.advisor is not None and not wanted.streams and (self.audit is None or self.audit.is_prefetching):
                self._follow(self.advisor, layer, groups.experts, hidden)
            on_host = self._start_on_host(wanted, hidden, groups)
            meanwhile()
            self._run_as_they_come(wanted, hidden, groups, out)
            if on_host is not None:
                wanted.failed |= on_host.finish(out)
        except BaseException:
            self._acquirer.abandon(wanted)
            raise
        for expert, error in wanted.failed.items():
            self._fail(groups, expert, error, out)

    def _start_on_host(self, wanted: Acquisition, hidden: torch.Tensor, groups: Regrouped) -> HostRun | None:
        if not wanted.on_host:
            return None
        assert self._host is not None
        return self._host.start(wanted.layer, hidden, groups, wanted.on_host)

    def _follow(self, advisor: Advisor, layer: MoELayer, experts: Sequence[int], hidden: torch.Tensor) -> None:
        found = advisor.advise(layer, experts, hidden)
        for advice in found:
            self.usage.expect(advice.layer, advice.experts)
        for advice in found if self.audit is None else self.audit.allowed(found):
            self.cache.prefetch(advice.layer, advice.experts, advice.urgencies)

    def _run_as_they_come(
        self, wanted: Acquisition, hidden: torch.Tensor, groups: Regrouped, out: torch.Tensor
    ) -> None:
        """Everything that is ready in one call, again and again until nothing is missing."""
        started: dict[int, StartedMLP] = {}
        while True:
            self._finish(wanted, started, out)
            ready = wanted.next_ready()
            segments = [groups.segments[e] for e in ready]
            self.compute.run(hidden, groups.tokens, segments, [wanted.ready[e] for e in ready], out)
            for expert in ready:
                self._acquirer.release(wanted, expert)
            if wanted.ready:
                continue
            if not wanted.is_pending:
                return
            self._acquirer.wait(wanted)
            while wanted.inputs:
                expert, weights = wanted.inputs.popitem()
                half = self.compute.start(hidden, groups.tokens, groups.segments[expert], weights)
                if half is not None:
                    started[expert] = half

    def _finish(self, wanted: Acquisition, started: dict[int, StartedMLP], out: torch.Tensor) -> None:
        """The second half of experts whose first half ran while they were being read."""
        for expert in started.keys() & wanted.ready.keys():
            self.compute.finish(started.pop(expert), out)
            self._acquirer.release(wanted, expert)

    def _fail(self, groups: Regrouped, expert: int, error: ExpertReadError, out: torch.Tensor) -> None:
        start, end = groups.segments[expert]
        out[start:end] = 0
        for row in groups.tokens[start:end].tolist():
            self._failed_rows.setdefault(row, error)

    # ---- between steps ----------------------------------------------------------------------------

    def between_steps(self) -> None:
        """See Experts."""
        if self._guard is not None:
            num_slots = self._guard.check(self.cache.table.num_owned)
            if num_slots is not None:
                self.cache.resize(num_slots)
        self.cache.rebalance()

    def resize(self, mib: int) -> None:
        """See Experts."""
        num_slots = slots_in(mib, self._slot_bytes, self.store.num_total)
        if num_slots < 1:
            least = least_mib(1, self._slot_bytes)
            raise ResizeError(f"{mib} MiB do not hold a single expert; give at least {least}")
        most = least_mib(self.store.num_total, self._slot_bytes)
        if mib > most:
            raise ResizeError(f"{mib} MiB are more than all experts need; give at most {most}")
        self.cache.resize(num_slots)
        if self._guard is not None:
            self._guard.resized(num_slots)

    def keep_only(self, wanted: NDArray[np.bool_]) -> None:
        """Free the slots of experts outside `wanted` [L, E]."""
        self.cache.keep_only(wanted)

    # ---- looking at it ----------------------------------------------------------------------------

    def resident(self) -> NDArray[np.bool_]:
        """See Experts."""
        return self.cache.table.slot_of >= 0

    def residency(self) -> Residency:
        """What is in slots now, and what was read to get there."""
        return self.cache.residency()

    def report(self) -> ExpertReport:
        """See Experts."""
        observers = self.cache.observers
        return replace(super().report(), shadow_hits=observers.shadow_hits, belady_gap_frac=observers.belady_gap_frac)

    def check_integrity(self) -> None:
        """AssertionError if the cache's books disagree."""
        self.cache.check_integrity()

    def close(self) -> None:
        """See Experts."""
        self.cache.close()
        if self._host is not None:
            self._host.close()
