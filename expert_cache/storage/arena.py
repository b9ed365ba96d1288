"""HostArena: RAM that experts are read into, cut into equal slots.

One anonymous mapping, reserved for every slot there could ever be and backed by RAM only where a slot
has been written. Giving a slot's memory back, or taking more, is therefore free of copies: that is
what makes the cache's budget elastic. Knows no experts.
"""

from __future__ import annotations

import contextlib
import mmap
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from expert_cache.storage.direct_io import BLOCK_BYTES

HUGE_PAGE_BYTES = 2 << 20
MAP_NORESERVE = 0x4000
"""Linux's value; Python names it from 3.13 on."""


class SlotArena(Protocol):
    """Slots 0..num_slots-1 of `slot_bytes` bytes on one device, and how bytes get into them."""

    num_slots: int
    slot_bytes: int
    lands_in_place: bool
    """`landing` is the slot's own memory, so what has been read can be used before the rest."""

    def tensor(self, slot: int) -> torch.Tensor:
        """The slot's memory as uint8 [slot_bytes] on the device; stable until `release`."""
        ...

    def preparing(self) -> AbstractContextManager[object]:
        """What reads a tensor for the first time, and lays its contents out anew, is to be issued inside."""
        ...

    def landing(self, slot: int) -> memoryview:
        """Host memory, block-aligned, that the slot's next expert is to be read into."""
        ...

    def landed(self, slot: int) -> None:
        """The expert is complete in the memory that `landing` gave: work on the slot's tensor may be issued."""
        ...

    def dropped(self, slot: int) -> None:
        """What was to land will not come."""
        ...

    def release(self, slot: int) -> None:
        """Give the slot's memory back to the system; its contents are lost."""
        ...


class HostArena:
    """Slots in host memory, read into directly."""

    lands_in_place = True

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        """Reserve address space for `num_slots`; no memory is used before a slot is written."""
        assert slot_bytes % BLOCK_BYTES == 0
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._memory = mmap.mmap(-1, max(num_slots * slot_bytes, BLOCK_BYTES), flags=flags)
        if slot_bytes >= HUGE_PAGE_BYTES:
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._tensor = torch.frombuffer(self._memory, dtype=torch.uint8)

    def tensor(self, slot: int) -> torch.Tensor:
        """The slot's memory as uint8 [slot_bytes]."""
        start = self._start(slot)
        return self._tensor[start : start + self.slot_bytes]

    def preparing(self) -> AbstractContextManager[object]:
        """Nothing is needed."""
        return contextlib.nullcontext()

    def landing(self, slot: int) -> memoryview:
        """The slot itself."""
        start = self._start(slot)
        return memoryview(self._memory)[start : start + self.slot_bytes]

    def landed(self, slot: int) -> None:
        """Nothing is left to do."""

    def dropped(self, slot: int) -> None:
        """Nothing is left to do."""

    def release(self, slot: int) -> None:
        """The kernel takes the pages back; the address range stays reserved."""
        self._memory.madvise(mmap.MADV_DONTNEED, self._start(slot), self.slot_bytes)

    def _start(self, slot: int) -> int:
        assert 0 <= slot < self.num_slots
        return slot * self.slot_bytes
