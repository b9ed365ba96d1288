"""LocalExperts: what all ways of keeping experts in this process have in common.

Books of what was routed and used, and tokens regrouped by expert. The answers here are those of experts that never
move; a cache that the host manages gives its own. Knows no slots.

Shape alphabet: T tokens, H hidden, K choices per token, P = T * K pairs, L MoE layers, E experts per layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray

from expert_cache.report import CacheCounters, ExpertReport, ExpertTotals, Residency
from expert_cache.running.compute import ExpertCompute
from expert_cache.running.experts import PaddingRows, Plan, ResizeError, Work, nothing
from expert_cache.running.in_place import InPlaceExperts
from expert_cache.running.regroup import Regrouped, regroup, regroup_pairs
from expert_cache.running.usage import ExpertUsage, RouteBuffer
from expert_cache.storage import ExpertReadError, ExpertStore
from predictors.shape import MoELayer


class LocalExperts(ABC, Generic[Plan]):
    """Experts of one process; see Experts for what each method promises."""

    padding: PaddingRows | None = None

    def __init__(self, store: ExpertStore, compute: ExpertCompute, counters: CacheCounters) -> None:
        self.store = store
        self.compute = compute
        self.counters = counters
        self.usage = ExpertUsage(len(store.layers), store.num_experts)
        self.routes = RouteBuffer(len(store.layers), store.num_experts)

    @abstractmethod
    def run(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, meanwhile: Work = nothing
    ) -> torch.Tensor:
        """See Experts."""

    @abstractmethod
    def residency(self) -> Residency:
        """Where the experts are at this moment."""

    def in_place(self) -> InPlaceExperts | None:
        """See Experts."""
        return None

    def begin_step(self, plan: Plan) -> None:
        """Nothing observes the step."""

    def between_steps(self) -> None:
        """Nothing moves."""

    def take_failures(self) -> Mapping[int, ExpertReadError]:
        """Every expert was read when the model was loaded, or is read as memory."""
        return {}

    def resize(self, mib: int) -> None:
        """There is nothing whose size could change: ResizeError."""
        raise ResizeError("this server was started without an expert cache (--moe-cache-mib)")

    def resident(self) -> NDArray[np.bool_] | None:
        """See Experts."""
        return None

    def report(self) -> ExpertReport:
        """See Experts."""
        return ExpertReport(
            layers=self.store.decoder_layers,
            expert_bytes=self.store.expert_bytes,
            tokens=self.usage.tokens(),
            counts=self.counters.by_layer() | self.usage.predictions(),
            residency=self.residency(),
        )

    def totals(self) -> ExpertTotals:
        """See Experts."""
        return self.counters.totals()

    def check_integrity(self) -> None:
        """AssertionError if the books disagree; here there is one book only."""

    def close(self) -> None:
        """There is no thread."""


class RegroupedExperts(LocalExperts[Plan]):
    """Runs each expert once for all its tokens, and sums each token's results.

    A pair's result goes to its own row and the sum runs over the choices in the router's order, so the order in which
    experts run cannot change a bit.
    """

    reads_can_fail = False
    """An expert may be unreadable when it is needed, although it was there before."""

    def run(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, meanwhile: Work = nothing
    ) -> torch.Tensor:
        """See Experts."""
        self.routes.add(ids, weights)
        if (in_place := self.in_place()) is not None:
            meanwhile()
            return in_place.run(layer, hidden, ids, weights)
        groups = regroup(ids, self.store.num_experts)
        mixed = self.compute.combine(self._run_pairs(layer, hidden, groups, meanwhile), weights)
        return mixed.to(hidden.dtype)

    def partial_sums(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As `run`, but some choices run elsewhere: those have negative ids and add nothing.

        hidden [T, H]; ids [T, K] int64; weights [T, K] float32 -> [T, H] float32 at least.
        """
        pairs = (ids.flatten() >= 0).nonzero()[:, 0]
        outputs = self.compute.result_like(hidden, ids.numel()).zero_()
        if len(pairs):
            token_of = pairs.div(ids.shape[1], rounding_mode="floor")
            groups = regroup_pairs(ids.flatten()[pairs], token_of, self.store.num_experts)
            outputs.index_copy_(0, pairs, self._run_pairs(layer, hidden, groups, nothing))
        return (outputs.view(*ids.shape, hidden.shape[1]) * weights[..., None]).sum(dim=1)

    def _run_pairs(self, layer: MoELayer, hidden: torch.Tensor, groups: Regrouped, meanwhile: Work) -> torch.Tensor:
        """Each pair's expert applied to its token: hidden [T, H] -> [P, H] in the order of pairs, float32 at least."""
        self.usage.use(layer, groups.experts, groups.counts)
        out = self.compute.result_like(hidden, len(groups.pairs))
        self._fill(layer, hidden, groups, out, meanwhile)
        return torch.empty_like(out).index_copy_(0, groups.pairs, out)

    @abstractmethod
    def _fill(
        self, layer: MoELayer, hidden: torch.Tensor, groups: Regrouped, out: torch.Tensor, meanwhile: Work
    ) -> None:
        """Run the groups: hidden [T, H] -> `out` [P, H] in the order of groups, zero where an expert cannot be read."""

    def keep_only(self, wanted: NDArray[np.bool_]) -> None:
        """Experts outside `wanted` [L, E] will not be asked for any more."""
