"""InPlaceExperts: all experts of all layers where the CPU's kernels read them, so that none has to be brought.

Knows no cache.

Shape alphabet: T tokens, H hidden, K choices per token, L MoE layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from expert_cache.report import CacheCounters
from expert_cache.running.compute import PreparedWeights
from expert_cache.running.usage import ExpertUsage, RouteBuffer
from moe_serve_kernels.cpu.expert_layer import ExpertLayer
from moe_serve_kernels.cpu.expert_mlp import Activation, MLPWeights
from predictors.shape import Key, MoELayer


class InPlaceExperts:
    """Runs a layer at once, and books what a kernel has run by itself."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        activation: Activation,
        routes: RouteBuffer,
        usage: ExpertUsage,
        counters: CacheCounters,
    ) -> None:
        """`layers` [L]. The others: the books of the Experts that have them."""
        self.layers = layers
        self._activation = activation
        self._routes, self._usage, self._counters = routes, usage, counters

    def run(self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As Experts.run, but for the routes: hidden [T, H], ids and weights [T, K] -> [T, H] in hidden's dtype."""
        out, counts = self.layers[layer].run(hidden.float(), ids, weights, self._activation)
        self._count_experts(layer, counts)
        return out.to(hidden.dtype)

    def have_run(self, ids: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """A kernel has run all layers of a step itself: ids [L, T, K] int64, weights [L, T, K]; counts [L, E] int64 of
        the pairs that each expert had, if the kernel has counted them."""
        if self._routes.is_on:
            for chosen, weight in zip(ids, weights, strict=True):
                self._routes.add(chosen, weight)
        if counts is None:
            self._count_ids(ids)
            return
        for layer, own in enumerate(counts.tolist()):
            self._count_experts(MoELayer(layer), own)

    def _count_ids(self, ids: torch.Tensor) -> None:
        """[L, T, K]."""
        once = [1] * ids.shape[2]
        for layer, experts in enumerate(ids.flatten(1).tolist()):
            if len(experts) == len(once):  # of one token, which chooses no expert twice
                self._count(MoELayer(layer), experts, once)
                continue
            counts = Counter(experts)
            self._count(MoELayer(layer), list(counts), list(counts.values()))

    def _count_experts(self, layer: MoELayer, counts: Sequence[int]) -> None:
        """counts [E]."""
        self._count(layer, [e for e, count in enumerate(counts) if count], [count for count in counts if count])

    def _count(self, layer: MoELayer, experts: Sequence[int], counts: Sequence[int]) -> None:
        """These were used where they are, each for this many tokens."""
        self._usage.use(layer, experts, counts)
        self._counters.hits[layer] += len(experts)


def layers_of(weights: Mapping[Key, PreparedWeights]) -> list[ExpertLayer]:
    """All experts of a model as layers that run at once; [] if the kernels cannot read them all."""
    by_layer: dict[MoELayer, list[MLPWeights]] = {}
    for (layer, _), expert in sorted(weights.items(), key=lambda item: item[0]):
        if not isinstance(expert, MLPWeights):
            return []
        by_layer.setdefault(layer, []).append(expert)
    return [ExpertLayer(experts) for experts in by_layer.values()]
