"""FileState: whether an open file still has the bytes it had. Its times alone do not tell: `touch` changes them too.

A file whose size and times are as before is unchanged. One of another size has changed. Where only times differ, a
sample decides: a file that a backup touched, or that got a hard link or other permissions, is unchanged. Knows no
tensors.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

BLOCK_BYTES = mmap.PAGESIZE
"""O_DIRECT wants offsets, lengths and memory in whole pages."""
WHOLE_BYTES = 1 << 20
"""The sample of a file up to this size is the whole file."""
NUM_BLOCKS = 32
"""In the sample of a larger file, at equal distances, the first and the last included: a few milliseconds to read."""


class FileState:
    """What an open file was when this was made. Safe to ask from several threads."""

    def __init__(self, descriptor: int) -> None:
        """OSError: the file cannot be examined."""
        self._descriptor = descriptor
        self._size, self._times = self._look()
        self._sample = self._read_sample()

    def is_unchanged(self) -> bool:
        """OSError: the file cannot be examined."""
        size, times = self._look()
        if size != self._size:
            return False
        if times != self._times:
            if self._read_sample() != self._sample:
                return False
            self._times = times
        return True

    def _look(self) -> tuple[int, tuple[int, int]]:
        """Size, and times of the last change of bytes and of anything: a program can set the former only."""
        status = os.fstat(self._descriptor)
        return status.st_size, (status.st_mtime_ns, status.st_ctime_ns)

    def _read_sample(self) -> int:
        """A checksum. A block that cannot be read counts as empty: reading an expert from it will name it."""
        checksum = 0
        with _opened_again(self._descriptor) as descriptor, mmap.mmap(-1, BLOCK_BYTES) as block:
            for offset in _sample_offsets(self._size):
                try:
                    count = os.preadv(descriptor, [block], offset)
                except OSError:
                    count = 0
                checksum = zlib.crc32(block[:count], checksum)
        return checksum


@contextmanager
def _opened_again(descriptor: int) -> Iterator[int]:
    """The same file past the page cache, so that a sample leaves nothing there; as it is where that is refused."""
    try:
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        yield descriptor
        return
    try:
        yield again
    finally:
        os.close(again)


def _sample_offsets(size: int) -> Iterator[int]:
    """Where the blocks of a file's sample begin."""
    num_blocks = -(-size // BLOCK_BYTES)
    if size <= WHOLE_BYTES:
        yield from range(0, size, BLOCK_BYTES)
    else:
        yield from (i * (num_blocks - 1) // (NUM_BLOCKS - 1) * BLOCK_BYTES for i in range(NUM_BLOCKS))
