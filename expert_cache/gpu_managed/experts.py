"""ResidentExperts: every expert in the GPU's memory from the start, so that a layer runs without asking the host.

The counterpart of MappedExperts for GPUs: what a CUDA graph of a decoding step can hold.

Shape alphabet: T tokens, H hidden, K choices, E experts.
"""

from __future__ import annotations

import torch

from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.pool import PooledExpert
from expert_cache.running import MappedExperts, PaddingRows, Work, nothing
from expert_cache.storage import ExpertStore
from predictors.shape import Key, MoELayer


class ResidentExperts(MappedExperts):
    """MappedExperts whose weights were all prepared into the pool when it was made."""

    def __init__(self, store: ExpertStore, compute: GpuCompute, device: torch.device) -> None:
        """Reads the whole checkpoint. The pool must have room for every expert."""
        super().__init__(store, compute)
        self.padding = PaddingRows()
        self._pool = compute.pool.experts
        self._slot_of = [
            torch.tensor([self._slot((layer, e)) for e in range(store.num_experts)], dtype=torch.int32).to(device)
            for layer in store.layers
        ]

    def in_place(self) -> None:
        """The CPU's kernels run nothing here."""

    def _slot(self, key: Key) -> int:
        weights = self.prepared(key)
        assert isinstance(weights, PooledExpert)
        return weights.slot

    def run(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, meanwhile: Work = nothing
    ) -> torch.Tensor:
        """See Experts; nothing in it waits for the device, and its launches follow from shapes alone."""
        from moe_serve_kernels.gpu.moe_layer import moe_layer  # needs triton, which machines without a GPU may lack

        self.routes.add(ids, weights)
        meanwhile()
        assert self.padding is not None
        chosen, slot_of = self.padding.leave_out(ids), self._slot_of[layer]
        return moe_layer(hidden, chosen, weights, slot_of, self._pool, self.compute.activation)
