"""CudaArena: slots in GPU memory, filled through pinned staging buffers on a stream of their own.

For GPUs without triton; with it, `transit.py` does this and overlaps. Bytes are read into pinned host memory and copied
from there; what is computed after a landing waits for the copy. Pinned memory is bounded: beyond
`num_staging` buffers a pageable one is used, which is slower and always there.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch

from expert_cache.storage.staging import Staging, pinned


class CudaArena:
    """Slots of `slot_bytes` bytes, each a tensor of its own, so that memory can be given back slot by slot."""

    lands_in_place = False

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device, num_staging: int = 4) -> None:
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        self._device = device
        self._copies: Any = torch.cuda.Stream(device)
        self._slots: dict[int, torch.Tensor] = {}
        self._staging = Staging([pinned(slot_bytes) for _ in range(num_staging)])

    def tensor(self, slot: int) -> torch.Tensor:
        """The slot's memory as uint8 [slot_bytes] on the GPU."""
        return self._memory(slot)

    def _memory(self, slot: int) -> torch.Tensor:
        if slot not in self._slots:
            self._slots[slot] = torch.empty(self.slot_bytes, dtype=torch.uint8, device=self._device)
        return self._slots[slot]

    def preparing(self) -> AbstractContextManager[object]:
        """Nothing is needed: the current stream waits for what has landed."""
        return contextlib.nullcontext()

    def landing(self, slot: int) -> memoryview:
        """A staging buffer, pinned if one is free."""
        return self._staging.landing(slot, waits=False)

    def landed(self, slot: int) -> None:
        """Issue the copy to the GPU; work issued to the current stream from now on comes after it."""
        buffer = self._staging.landed(slot)
        compute = torch.cuda.current_stream(self._device)
        # The slot's previous expert may still be read by kernels that were issued but have not run.
        self._copies.wait_stream(compute)
        memory = self._memory(slot)
        with torch.cuda.stream(self._copies):
            memory.copy_(buffer, non_blocking=True)
        done = self._copies.record_event()
        compute.wait_event(done)
        self._staging.drain(buffer, done)

    def dropped(self, slot: int) -> None:
        """The staging buffer is free again."""
        self._staging.dropped(slot)

    def release(self, slot: int) -> None:
        """Back to torch's allocator."""
        self._slots.pop(slot, None)
