"""MappedExperts: every expert straight from the memory-mapped checkpoint, as if all were resident.

The counterpart of ExpertCache for models that fit in memory: the kernel's page cache is the cache,
loading costs nothing, and a restarted server finds its experts where the last one left them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from expert_cache.acquisition import Acquisition
from expert_cache.compute import PreparedWeights, in_place
from expert_cache.counters import CacheCounters
from expert_cache.report import Residency
from expert_cache.storage.store import ExpertStore, ExpertWeights
from moe_serve_kernels.cpu.expert_layer import ExpertLayer


class MappedExperts:
    """The part of ExpertCache's interface that running a layer needs."""

    def __init__(self, store: ExpertStore, prepare: Callable[[ExpertWeights], PreparedWeights]) -> None:
        self.store = store
        self.counters = CacheCounters(len(store.layers))
        self._prepare = prepare
        self._index = {layer: i for i, layer in enumerate(store.layers)}
        self._weights: dict[tuple[int, int], PreparedWeights] = {}
        self._in_place: Mapping[int, ExpertLayer] | None = None

    @property
    def belady_gap_frac(self) -> float | None:
        """Without misses there is no gap."""
        return None

    @property
    def shadow_hits(self) -> dict[str, int]:
        """There is no cache another policy could run."""
        return {}

    def residency(self) -> Residency:
        """Every expert is mapped."""
        shape = len(self.store.layers), self.store.num_experts
        return Residency(np.ones(shape, np.bool_), np.zeros(shape, np.bool_), fast_tier="host", slow_tier="host")

    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> Acquisition:
        """Everything is ready at once."""
        self.counters.hits[self._index[layer]] += len(experts)
        return Acquisition(layer, False, {e: self._ready(layer, e) for e in experts})

    def _ready(self, layer: int, expert: int) -> PreparedWeights:
        weights = self._weights.get((layer, expert))
        if weights is None:
            weights = self._weights[layer, expert] = self._prepare(self.store.weights(layer, expert))
        return weights

    def layers_in_place(self) -> Mapping[int, ExpertLayer]:
        """By layer, if the kernels can read all experts where they are mapped; else {}. The same object every time."""
        if self._in_place is None:
            keys = itertools.product(self.store.layers, range(self.store.num_experts))
            self._in_place = {} if self.store.is_copied else in_place({key: self._ready(*key) for key in keys})
        return self._in_place

    def wait(self, wanted: Acquisition) -> None:
        raise AssertionError("nothing is ever on its way")

    def release(self, wanted: Acquisition, expert: int) -> None:
        """The expert has run."""
        del wanted.ready[expert]

    def abandon(self, wanted: Acquisition) -> None:
        """The step has failed."""
        wanted.ready.clear()

    def prefetch(self, layer: int, experts: Sequence[int], urgencies: Sequence[float]) -> None:
        """Everything is here already."""

    def check_integrity(self) -> None:
        """Nothing can go wrong here."""

    def close(self) -> None:
        """Nothing to stop."""
