"""Staging: buffers on the host that experts are read into, on their way to a GPU.

A buffer is used again once the copy out of it is done. Pinned memory is bounded: a landing that finds no buffer gets
pageable memory, which is slower and always there. Knows marks of a stream; knows no GPU.
"""

from __future__ import annotations

import mmap
from collections import deque

import torch

from expert_cache.storage.copy_stream import Mark
from expert_cache.storage.direct_io import BLOCK_BYTES


class Staging:
    """Buffers by the slot that they are read for."""

    def __init__(self, buffers: list[torch.Tensor]) -> None:
        """`buffers`: at least one, pinned, all of one size."""
        self._num_bytes = len(buffers[0])
        self._pinned = {buffer.data_ptr() for buffer in buffers}
        self._idle = list(buffers)
        self._draining: deque[tuple[Mark, torch.Tensor]] = deque()
        self._landing: dict[int, torch.Tensor] = {}

    def landing(self, slot: int, waits: bool) -> memoryview:
        """A buffer to read into. `waits`: for the first copy that will be done, rather than take pageable memory."""
        self._reclaim()
        if waits and not self._idle and self._draining:
            self._draining[0][0].synchronize()
            self._reclaim()
        self._landing[slot] = self._idle.pop() if self._idle else pageable(self._num_bytes)
        data: memoryview = self._landing[slot].numpy().data
        return data

    def landed(self, slot: int) -> torch.Tensor:
        """The buffer that was read into; `drain` takes it back."""
        return self._landing.pop(slot)

    def drain(self, buffer: torch.Tensor, copied: Mark) -> None:
        """It is free again once `copied` is reached."""
        self._draining.append((copied, buffer))

    def dropped(self, slot: int) -> None:
        """The slot's buffer is free again."""
        self._keep(self._landing.pop(slot))

    def _reclaim(self) -> None:
        while self._draining and self._draining[0][0].query():
            self._keep(self._draining.popleft()[1])

    def _keep(self, buffer: torch.Tensor) -> None:
        if buffer.data_ptr() in self._pinned:
            self._idle.append(buffer)


def pinned(num_bytes: int) -> torch.Tensor:
    """Pinned memory, block-aligned so that files can be read into it directly."""
    memory = torch.empty(num_bytes + BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    start = -memory.data_ptr() % BLOCK_BYTES
    return memory[start : start + num_bytes]


def pageable(num_bytes: int) -> torch.Tensor:
    """Block-aligned memory that no device reads by itself."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
