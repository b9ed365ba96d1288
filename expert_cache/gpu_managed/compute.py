"""GpuCompute: ExpertCompute on a GPU, by the grouped kernels over a pool of slots.

Experts come in waves as the cache brings them; each wave is one grouped gate_up and one grouped down, for any
number of experts.

Shape alphabet: T tokens, P (token, choice) pairs sorted by expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expert_cache.gpu_managed.pool import PooledExpert, SlotPool
from expert_cache.running import ExpertCompute, PreparedWeights, Segment
from expert_cache.storage import ExpertWeights
from moe_serve_kernels.cpu.expert_mlp import Activation


class GpuCompute(ExpertCompute):
    """One model's expert function on one GPU."""

    def __init__(self, activation: Activation, dtype: torch.dtype, device: torch.device, pool: SlotPool) -> None:
        super().__init__(activation, dtype, device, matrix_tokens=0)
        self.activation = activation
        self.pool = pool

    def prepare(self, weights: ExpertWeights) -> PooledExpert:
        """Into a slot of the pool."""
        return self.pool.put(weights)

    def run(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        segments: Sequence[Segment],
        weights: Sequence[PreparedWeights],
        out: torch.Tensor,
    ) -> None:
        """See ExpertCompute; all of one wave in two launches."""
        if not weights:
            return
        from moe_serve_kernels.gpu.moe_layer import run_segments  # needs triton, which machines without a GPU may lack

        slots = []
        for expert in weights:
            assert isinstance(expert, PooledExpert)
            slots.append(expert.slot)
        with self.pool.order.reading(slots):
            run_segments(hidden.contiguous(), tokens, segments, slots, self.pool.experts, self.activation, out)
