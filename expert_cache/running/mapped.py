"""MappedExperts: every expert straight from the memory-mapped checkpoint, as if all were resident.

For models that fit in memory: the kernel's page cache is the cache, loading costs nothing, and a restarted server
finds its experts where the last one left them.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from expert_cache.report import CacheCounters, Residency
from expert_cache.running.compute import ExpertCompute, PreparedWeights
from expert_cache.running.experts import Work
from expert_cache.running.in_place import InPlaceExperts, layers_of
from expert_cache.running.local_experts import RegroupedExperts
from expert_cache.running.regroup import Regrouped
from expert_cache.storage import ExpertStore
from predictors.shape import Key, MoELayer


class MappedExperts(RegroupedExperts[object]):
    """Experts that are prepared when they are first used, and then stay."""

    def __init__(self, store: ExpertStore, compute: ExpertCompute) -> None:
        super().__init__(store, compute, CacheCounters(len(store.layers)))
        self._weights: dict[Key, PreparedWeights] = {}
        self._in_place: InPlaceExperts | None = None
        self._can_be_in_place = compute.runs_layers and not store.is_copied

    def residency(self) -> Residency:
        """Every expert is mapped."""
        shape = len(self.store.layers), self.store.num_experts
        return Residency(np.ones(shape, np.bool_), np.zeros(shape, np.bool_), fast_tier="host", slow_tier="host")

    def in_place(self) -> InPlaceExperts | None:
        """All experts, if the kernels can read them where they are mapped."""
        if self._can_be_in_place and self._in_place is None:
            keys = itertools.product(self.store.layers, range(self.store.num_experts))
            layers = layers_of({key: self.prepared(key) for key in keys})
            self._can_be_in_place = bool(layers)
            if layers:
                self._in_place = InPlaceExperts(layers, self.compute.activation, self.routes, self.usage, self.counters)
        return self._in_place

    def prepared(self, key: Key) -> PreparedWeights:
        """An expert as `compute` runs it."""
        weights = self._weights.get(key)
        if weights is None:
            weights = self._weights[key] = self.compute.prepare(self.store.weights(*key))
        return weights

    def _fill(
        self, layer: MoELayer, hidden: torch.Tensor, groups: Regrouped, out: torch.Tensor, meanwhile: Work
    ) -> None:
        """Everything is ready at once."""
        self.counters.hits[layer] += len(groups.experts)
        meanwhile()
        segments = [groups.segments[e] for e in groups.experts]
        self.compute.run(hidden, groups.tokens, segments, [self.prepared((layer, e)) for e in groups.experts], out)
