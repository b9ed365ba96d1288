"""HostHeap: host memory that a GPU can read by itself, handed out piece by piece and given back as a whole.

Pinned in chunks of a power of two, because torch's allocator rounds every pinned allocation up to one: an allocation
per tensor would take up to twice the memory. Knows no experts.
"""

from __future__ import annotations

import torch

CHUNK_BYTES = 1 << 30
ALIGN_BYTES = 16
"""Of every piece: what a copying kernel moves at a time."""


class HostHeap:
    """Room for pieces of so many bytes in all."""

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        """`num_bytes`: what will be taken, roundings to ALIGN_BYTES included. `pinned`: a GPU reads it."""
        self._left = num_bytes
        self._pinned = pinned
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised uint8 [num_bytes]. RuntimeError: the system gives no more pinned memory."""
        size = -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
        if self._used + size > len(self._chunk):
            wanted = max(size, min(CHUNK_BYTES, self._left))
            self._chunk, self._used = torch.empty(wanted, dtype=torch.uint8, pin_memory=self._pinned), 0
        piece = self._chunk[self._used : self._used + num_bytes]
        self._used += size
        self._left -= size
        return piece
