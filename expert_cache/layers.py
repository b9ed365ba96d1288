"""ExpertLayers: runs a MoE layer's experts for the tokens routed to them.

Regroups tokens by expert, runs the experts that are ready while the others are being read, then
each as it arrives, and sums each token's results. A pair's result goes to its own row and the sum
runs over the choices in the router's order, so the order of arrival cannot change a bit.
Knows nothing of models, requests or routers.

Shape alphabet: T tokens, H hidden, K choices per token, P = T * K pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from expert_cache.acquisition import Acquisition
from expert_cache.compute import ExpertCompute
from expert_cache.counters import CacheCounters
from expert_cache.errors import ExpertReadError
from expert_cache.gpu_managed.experts import DeviceExperts
from expert_cache.host_compute.host_experts import HostExperts, HostRun
from expert_cache.prefetch.advisors import Advisor
from expert_cache.prefetch.audit import PrefetchAudit
from expert_cache.regroup import Regrouped, regroup
from expert_cache.report import ExpertReport, Residency
from expert_cache.route_buffer import RouteBuffer
from expert_cache.storage.store import ExpertStore
from expert_cache.usage import ExpertUsage
from moe_serve_kernels.cpu.expert_layer import ExpertLayer
from moe_serve_kernels.cpu.expert_mlp import StartedMLP


def _nothing() -> None:
    """Nobody has anything to do meanwhile."""


class Experts(Protocol):
    """Where experts come from: ExpertCache or MappedExperts."""

    store: ExpertStore
    counters: CacheCounters

    @property
    def belady_gap_frac(self) -> float | None: ...
    @property
    def shadow_hits(self) -> dict[str, int]: ...
    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> Acquisition: ...
    def wait(self, wanted: Acquisition) -> None: ...
    def release(self, wanted: Acquisition, expert: int) -> None: ...
    def abandon(self, wanted: Acquisition) -> None: ...
    def layers_in_place(self) -> Mapping[int, ExpertLayer]: ...
    def prefetch(self, layer: int, experts: Sequence[int], urgencies: Sequence[float]) -> None: ...
    def residency(self) -> Residency: ...
    def check_integrity(self) -> None: ...
    def close(self) -> None: ...


class RouteWatcher(Protocol):
    """Sees each layer's routes as they are chosen."""

    def watch(self, layer: int, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        """`layer`: dense index; ids [T, K] int64; hidden [T, H]."""
        ...


class ExpertLayers:
    """The experts of all layers behind one call."""

    def __init__(
        self,
        experts: Experts,
        compute: ExpertCompute,
        advisor: Advisor | None = None,
        audit: PrefetchAudit | None = None,
        host: HostExperts | None = None,
    ) -> None:
        """`advisor`: whose expectations are brought ahead of time; None: only what the router asks for.
        `audit`: who decides whether that pays; None: always. `host`: who computes what `experts` leaves on the host."""
        self.experts = experts
        self.compute = compute
        self.advisor = advisor
        self.usage = ExpertUsage(experts.store.layers, experts.store.num_experts)
        self.audit = audit
        self.host = host
        self.tap = RouteBuffer(len(experts.store.layers), experts.store.num_experts)
        self.watcher: RouteWatcher | None = None
        """Who wants to see every layer's routes before anything is evicted for them."""
        self._failed_rows: dict[int, ExpertReadError] = {}

    @property
    def in_place(self) -> Mapping[int, ExpertLayer]:
        """By layer, experts that run at once because none has to be brought and nobody follows the routes; else {}."""
        if not self.compute.runs_layers or self.watcher is not None or self.advisor is not None:
            return {}
        return self.experts.layers_in_place()

    def run(
        self,
        layer: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        meanwhile: Callable[[], None] = _nothing,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        hidden [T, H]; ids [T, K] int64; weights [T, K] (float32 or hidden's dtype) -> [T, H].
        Tokens whose expert cannot be read get zeros, and `take_failures` tells which. `meanwhile`: called once, while
        experts are being read if any have to be.
        """
        if self.tap.is_on:
            self.tap.add(ids, weights)
        if isinstance(self.experts, DeviceExperts):
            meanwhile()
            return self.experts.run(layer, hidden, ids, weights)
        if (in_place := self.in_place.get(layer)) is not None:
            meanwhile()
            out, counts = in_place.run(hidden, ids, weights, self.compute.activation)
            self._count(layer, [e for e, count in enumerate(counts) if count], [count for count in counts if count])
            return out
        groups = regroup(ids, self.experts.store.num_experts)
        if self.audit is not None and layer == self.experts.store.layers[0]:
            self.audit.begin(len(hidden))
        if self.watcher is not None:
            self.watcher.watch(self.experts.store.layers.index(layer), ids, hidden)
        by_pair = self.run_pairs(layer, hidden, groups, meanwhile)
        if self.audit is not None and layer == self.experts.store.layers[-1]:
            self.audit.end()
        return self.compute.combine(by_pair, weights)

    def have_run(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """A kernel has run all layers of a step itself, on experts in place: ids [L, T, K] int64, weights [L, T, K]."""
        if self.tap.is_on:
            for chosen, weight in zip(ids, weights, strict=True):
                self.tap.add(chosen, weight)
        for layer, chosen in zip(self.experts.store.layers, ids.flatten(1).tolist(), strict=True):
            counts = Counter(chosen)
            self._count(layer, list(counts), list(counts.values()))

    def _count(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """These were used where they are, each for so many tokens."""
        self.usage.use(layer, experts, counts)
        self.experts.counters.hits[self.experts.store.layers.index(layer)] += len(experts)

    def run_pairs(
        self, layer: int, hidden: torch.Tensor, groups: Regrouped, meanwhile: Callable[[], None] = _nothing
    ) -> torch.Tensor:
        """Each pair's expert applied to its token: hidden [T, H] -> [P, H] in the order of pairs, float32 at least.

        Pairs whose expert cannot be read get zeros; see `run`.
        """
        self.usage.use(layer, groups.experts, groups.counts)
        out = self.compute.result_like(hidden, len(groups.pairs))
        wanted = self.experts.acquire(layer, groups.experts, groups.counts)
        try:
            if self.advisor is not None and not wanted.streams and (self.audit is None or self.audit.is_prefetching):
                self._follow(self.advisor, layer, groups.experts, hidden)
            on_host = self._start_on_host(wanted, hidden, groups)
            meanwhile()
            self._run_as_they_come(wanted, hidden, groups, out)
            if on_host is not None:
                wanted.failed |= on_host.finish(out)
        except BaseException:
            self.experts.abandon(wanted)
            raise
        for expert, error in wanted.failed.items():
            self._fail(groups, expert, error, out)
        return torch.empty_like(out).index_copy_(0, groups.pairs, out)

    def _start_on_host(self, wanted: Acquisition, hidden: torch.Tensor, groups: Regrouped) -> HostRun | None:
        if not wanted.on_host:
            return None
        assert self.host is not None
        return self.host.start(wanted.layer, hidden, groups, wanted.on_host)

    def _follow(self, advisor: Advisor, layer: int, experts: Sequence[int], hidden: torch.Tensor) -> None:
        layers = self.experts.store.layers
        found = advisor.advise(layers.index(layer), experts, hidden)
        for advice in found:
            self.usage.expect(layers[advice.layer], advice.experts)
        for advice in found if self.audit is None else self.audit.allowed(found):
            self.experts.prefetch(layers[advice.layer], advice.experts, advice.urgencies)

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
                self.experts.release(wanted, expert)
            if wanted.ready:
                continue
            if not wanted.is_pending:
                return
            self.experts.wait(wanted)
            while wanted.inputs:
                expert, weights = wanted.inputs.popitem()
                half = self.compute.start(hidden, groups.tokens, groups.segments[expert], weights)
                if half is not None:
                    started[expert] = half

    def _finish(self, wanted: Acquisition, started: dict[int, StartedMLP], out: torch.Tensor) -> None:
        """The second half of experts whose first half ran while they were being read."""
        for expert in started.keys() & wanted.ready.keys():
            self.compute.finish(started.pop(expert), out)
            self.experts.release(wanted, expert)

    def report(self) -> ExpertReport:
        """What the experts did since the start, and where they are now. Any thread may ask."""
        store = self.experts.store
        return ExpertReport(
            layers=store.layers,
            expert_bytes=store.expert_bytes,
            tokens=self.usage.tokens(),
            counts=self.experts.counters.by_layer() | self.usage.predictions(),
            residency=self.experts.residency(),
            shadow_hits=self.experts.shadow_hits,
            belady_gap_frac=self.experts.belady_gap_frac,
        )

    def close(self) -> None:
        """Stop all threads; more than once does no harm."""
        self.experts.close()
        if self.host is not None:
            self.host.close()

    def take_failures(self) -> dict[int, ExpertReadError]:
        """Tokens of the steps since the last call whose results are worthless, by their row, and why."""
        failures, self._failed_rows = self._failed_rows, {}
        return failures

    def _fail(self, groups: Regrouped, expert: int, error: ExpertReadError, out: torch.Tensor) -> None:
        start, end = groups.segments[expert]
        out[start:end] = 0
        for row in groups.tokens[start:end].tolist():
            self._failed_rows.setdefault(row, error)
