"""SlotPool: experts on a GPU in the layout its kernels read, each in a slot of its own.

An expert that has arrived is copied into a free slot, which puts any checkpoint's layout and data type into the
kernels' one; the slot is free again when nobody holds the expert any more. The pool is allocated once and never moves.
Knows no cache and no policy.

Shape alphabet: S slots, H hidden, I intermediate.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from expert_cache.store import ExpertWeights
from moe_serve_kernels import gpu
from moe_serve_kernels.cpu.expert_mlp import as_tensor
from moe_serve_kernels.gpu.pool import ExpertPool, empty_bank


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class PooledExpert(ExpertWeights):
    """Views of one slot. The slot belongs to this object until it is gone."""

    slot: int = -1


def is_available(device: torch.device) -> bool:
    """True when the GPU kernels can run on a pool of `device`."""
    return gpu.is_available(device)


class SlotPool:
    """S slots for experts like a given one."""

    def __init__(self, like: ExpertWeights, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype`: what weights are kept in, the compute dtype."""
        inner, hidden = like.gate.shape
        both, down = (2, inner, hidden), (hidden, inner)
        self.experts = ExpertPool(
            empty_bank(num_slots, both, "plain", dtype, device, with_bias=like.gate_bias is not None),
            empty_bank(num_slots, down, "plain", dtype, device, with_bias=like.down_bias is not None),
        )
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def put(self, weights: ExpertWeights) -> PooledExpert:
        """Copy an expert into a free slot; there must be one. Work issued before to the same stream may still read the
        slot's last expert: it comes first."""
        slot = self._free.pop()
        expert = self._views(slot)
        sources = (weights.gate, weights.up, weights.down, weights.gate_bias, weights.up_bias, weights.down_bias)
        targets = (expert.gate, expert.up, expert.down, expert.gate_bias, expert.up_bias, expert.down_bias)
        for target, source in zip(targets, sources, strict=True):
            if target is not None:
                assert source is not None, "an expert without the biases the first one had"
                assert isinstance(target, torch.Tensor)
                target.copy_(as_tensor(source, target.dtype), non_blocking=True)
        weakref.finalize(expert, self._free.append, slot)
        return expert

    def _views(self, slot: int) -> PooledExpert:
        both, down = self.experts.gate_up, self.experts.down
        gate_bias, up_bias = (None, None) if both.bias is None else (both.bias[slot, 0], both.bias[slot, 1])
        return PooledExpert(
            gate=both.data[slot, 0],
            up=both.data[slot, 1],
            down=down.data[slot],
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=None if down.bias is None else down.bias[slot],
            slot=slot,
        )
