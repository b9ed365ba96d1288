"""ResidentExperts: every expert in the GPU's memory from the start, so that a layer runs without asking the host.

The counterpart of MappedExperts for GPUs.

Shape alphabet: T tokens, H hidden, K choices, E experts.
"""

from __future__ import annotations

import torch

from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.experts import DeviceExperts
from expert_cache.gpu_managed.pool import PooledExpert
from expert_cache.mapped import MappedExperts
from expert_cache.storage.store import ExpertStore


class ResidentExperts(DeviceExperts, MappedExperts):
    """MappedExperts whose weights were all prepared into the pool when it was made."""

    def __init__(self, store: ExpertStore, compute: GpuCompute, device: torch.device) -> None:
        """Reads the whole checkpoint. The pool must have room for every expert."""
        DeviceExperts.__init__(self, compute)
        MappedExperts.__init__(self, store, compute.prepare)
        self._slot_of = {
            layer: torch.tensor([self._slot(layer, e) for e in range(store.num_experts)], dtype=torch.int32).to(device)
            for layer in store.layers
        }

    def _slot(self, layer: int, expert: int) -> int:
        weights = self._ready(layer, expert)
        assert isinstance(weights, PooledExpert)
        return weights.slot

    def _run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        from moe_serve_kernels.gpu.moe_layer import moe_layer  # needs triton, which machines without a GPU may lack

        pool, activation = self.compute.pool.experts, self.compute.activation
        return moe_layer(hidden, ids, weights, self._slot_of[layer], pool, activation)
