"""Transit: memory that experts pass through on their way into a GPU's pool, where their layout differs.

Bytes are read into pinned buffers on the host, as many as PINNED_BYTES hold, and copied on the stream for copies, where
`SlotPool.put` converts them. Nothing of it waits for a kernel. A buffer is used again once its copy is done.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from expert_cache.storage.copy_stream import CopyStream
from expert_cache.storage.staging import Staging, pinned

PINNED_BYTES = 512 << 20
FEWEST_BUFFERS = 4
"""Of experts beyond an eighth of PINNED_BYTES: two are read into, two are copied."""


class Transit:
    """A SlotArena whose slots are empty again as soon as `tensor` has been called."""

    lands_in_place = False

    def __init__(
        self,
        num_slots: int,
        slot_bytes: int,
        device: torch.device,
        stream: CopyStream,
        allocate: Callable[[int], torch.Tensor] = pinned,
    ) -> None:
        """`allocate`: pinned memory of that many bytes."""
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        self._device, self._stream = device, stream
        count = min(num_slots, max(FEWEST_BUFFERS, PINNED_BYTES // slot_bytes))
        self._staging = Staging([allocate(slot_bytes) for _ in range(count)])
        self._landed: dict[int, torch.Tensor] = {}

    def tensor(self, slot: int) -> torch.Tensor:
        """The slot's bytes, which leave the arena: they live as long as the returned tensor, which only work inside
        `preparing` may read."""
        return self._landed.pop(slot)

    def preparing(self) -> AbstractContextManager[object]:
        """The stream for copies."""
        return self._stream.copying()

    def landing(self, slot: int) -> memoryview:
        """A pinned buffer: one that is idle, or the first that will be. Pageable memory where all are being read into,
        whose copy the host waits for."""
        return self._staging.landing(slot, waits=True)

    def landed(self, slot: int) -> None:
        """Issue the copy to the GPU."""
        buffer = self._staging.landed(slot)
        with self._stream.copying():
            memory = torch.empty(self.slot_bytes, dtype=torch.uint8, device=self._device)
            memory.copy_(buffer, non_blocking=True)
        self._landed[slot] = memory
        self._staging.drain(buffer, self._stream.copies_so_far())

    def dropped(self, slot: int) -> None:
        """The buffer is free again."""
        self._staging.dropped(slot)

    def release(self, slot: int) -> None:
        """Nothing is left to give back."""
