"""SlotPool: experts on a GPU in the layout its kernels read, each in a slot of its own.

An expert that has arrived is copied into a free slot. The copy converts the checkpoint's layout and data type to the
kernels' (layout.py). The slot is free again when no reference to the expert is left. The pool is allocated once and
never moves. Knows no cache and no policy.

Shape alphabet: S slots.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from expert_cache.gpu_managed.layout import SlotLayout, slot_of_bank, write_slot
from expert_cache.storage import ExpertWeights, SlotOrder


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class PooledExpert(ExpertWeights):
    """One slot, whose weights are in the pool's own layout. The slot belongs to this object until it is gone."""

    slot: int = -1


class SlotPool:
    """S slots of one layout."""

    def __init__(self, layout: SlotLayout, num_slots: int, device: torch.device) -> None:
        self.layout = layout
        self.order = SlotOrder()
        """Of writes and reads; one with a stream for copies, where the host brings experts while kernels run."""
        self.experts = layout.pool(num_slots, device)
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def put(self, weights: ExpertWeights) -> PooledExpert:
        """Copy an expert into a free slot; there must be one. Kernels that still read the slot's last expert come
        first. Kernels that read this one are to be issued inside of `order.reading`."""
        slot = self._free.pop()
        gate_up, down = slot_of_bank(self.experts.gate_up, slot), slot_of_bank(self.experts.down, slot)
        with self.order.writing(slot):
            write_slot(weights, self.layout, gate_up, down)
        expert = PooledExpert(gate_up["data"], gate_up["data"], down["data"], slot=slot)
        weakref.finalize(expert, self._free.append, slot)
        return expert
