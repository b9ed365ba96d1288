"""A MoE layer whose experts are partly on the GPU, as one sequence of launches that a CUDA graph can capture.

    plan -> copy what is missing from pinned host memory (-> decode it into slots) -> the layer

The device decides all of it (residency.py), so a whole decode step can be one graph although its experts are unknown
beforehand. If a step chooses more experts of a layer than its pool has slots, they run in waves. The number of waves
follows from shapes alone.

Shape alphabet: L layers, E experts per layer, S slots, T tokens, K choices, P = T * K pairs, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu.coded_link import CodedLink
from moe_serve_kernels.gpu.combine import combine
from moe_serve_kernels.gpu.moe_layer import moe_layer, run_pairs
from moe_serve_kernels.gpu.pool import Bank, ExpertPool
from moe_serve_kernels.gpu.residency import Copies, copy_experts, new_residency, plan

HostParts = Mapping[str, Sequence[torch.Tensor]]
"""Of each part of a Bank the L*E experts' own, in pinned host memory, in the layout of the bank's slots."""


class CachedLayers:
    """The experts of L layers in host memory, some of them in the slots of a pool."""

    def __init__(
        self,
        gate_up: HostParts,
        down: HostParts,
        pool: ExpertPool,
        num_experts: int,
        slots: Sequence[tuple[int, int]],
        coded: CodedLink | None = None,
    ) -> None:
        """`slots`: each layer's range of the pool's slots; ranges are equal or apart. `coded` brings the weights that
        gate_up and down lack.

        ValueError: a part whose bytes per expert are no multiple of 16.
        """
        device = pool.down.data.device
        self.state = new_residency(len(slots), num_experts, pool.down.num_slots, device)
        self._pool, self._slots, self._num_experts = pool, slots, num_experts
        self._hosts = (gate_up, down)  # keeps alive what `sources` points to
        self._copies = _copies([(gate_up, pool.gate_up), (down, pool.down)], device) if gate_up else None
        self._coded = coded

    def run(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts: x [T, H], ids and weights [T, K] -> [T, H]."""
        first, last = self._slots[layer]
        num_waves = -(-min(ids.numel(), self._num_experts) // (last - first))
        if num_waves <= 1:
            self._bring(layer, ids)
            return moe_layer(x, ids, weights, self.state.of_layer(layer), self._pool, activation)
        return self._in_waves(layer, num_waves, x, ids, weights, activation)

    def _bring(self, layer: int, ids: torch.Tensor) -> None:
        plan(self.state, layer, ids.contiguous(), self._slots[layer])
        if self._copies is not None:
            copy_experts(self.state, self._copies)
        if self._coded is not None:
            self._coded.bring(self.state)

    def _in_waves(
        self,
        layer: int,
        num_waves: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        activation: Activation,
    ) -> torch.Tensor:
        """Each wave brings as many of the remaining experts as there are slots, and runs them."""
        outputs = torch.empty(
            ids.numel(), x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
        )
        slot_of = self.state.of_layer(layer)
        is_left = torch.ones(self._num_experts, dtype=torch.bool, device=x.device)
        for _ in range(num_waves):
            self._bring(layer, torch.where(is_left[ids], ids, -1))
            here = torch.where(is_left, slot_of, -1)
            run_pairs(x, ids, here, self._pool, activation, outputs)
            is_left &= here < 0
        out = torch.empty_like(x)
        combine(outputs, ids.contiguous(), weights.contiguous(), torch.zeros_like(slot_of), out)
        return out


def _copies(banks: Sequence[tuple[HostParts, Bank]], device: torch.device) -> Copies:
    sources, targets, sizes = [], [], []
    for host, bank in banks:
        for name, slots in bank.parts().items():
            if name not in host:
                continue
            size = slots[0].nbytes
            if size % 16:
                raise ValueError(f"{name}: {size} bytes per expert are no multiple of 16")
            sources.append([_address(part, slots[0]) for part in host[name]])
            targets.append(slots.data_ptr())
            sizes.append(size)
    return Copies(*(torch.tensor(table, dtype=torch.int64, device=device) for table in (sources, targets, sizes)))


def _address(part: torch.Tensor, like: torch.Tensor) -> int:
    assert part.is_contiguous()
    assert (part.dtype, part.shape) == (like.dtype, like.shape)
    assert part.data_ptr() % 16 == 0
    return part.data_ptr()
