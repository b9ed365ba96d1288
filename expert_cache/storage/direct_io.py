"""DirectFile: reading parts of a file past the page cache, and noticing when the file has changed.

A memory budget for experts is only honest if reading one does not leave a second copy in the
kernel's page cache: O_DIRECT reads go from the disk into the caller's memory and nowhere else. Where
a file system refuses O_DIRECT, pages are dropped right after they were read. Knows no tensors.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from expert_cache.storage.errors import ExpertReadError
from expert_cache.storage.file_state import FileState

BLOCK_BYTES = 4096
"""Alignment that O_DIRECT wants of offsets, lengths and memory: the page, and every disk's sector, divide it."""


def aligned_span(offset: int, num_bytes: int) -> tuple[int, int]:
    """The smallest (offset, length), both multiples of BLOCK_BYTES, that covers a part of a file.

    Example: (5000, 100) -> (4096, 4096); (4096, 8192) -> (4096, 8192); (4000, 200) -> (0, 8192).
    """
    first = offset // BLOCK_BYTES * BLOCK_BYTES
    last = -(-(offset + num_bytes) // BLOCK_BYTES) * BLOCK_BYTES
    return first, last - first


class DirectFile:
    """One open file. Safe to read from several threads."""

    def __init__(self, path: Path, direct: bool = True) -> None:
        """Open `path`; ExpertReadError if that fails.

        `direct` False: read through the page cache and leave it filled.
        """
        self.path = path
        self._keep_pages = not direct
        try:
            self._fd, self._is_direct = _open(path) if direct else (os.open(path, os.O_RDONLY | os.O_CLOEXEC), False)
            self._state = FileState(self._fd)
        except OSError as error:
            raise ExpertReadError(f"{path}: cannot be opened ({error.strerror})") from error

    def read(self, memory: memoryview, offset: int, needed: int) -> None:
        """Fill `memory` from `offset` on; at least `needed` bytes must be there.

        `offset`, the length and the address of `memory` are multiples of BLOCK_BYTES. The end of
        the file may cut the last block short, which is why `needed` can be less than the length.
        """
        done = 0
        while done < needed:
            try:
                count = os.preadv(self._fd, [memory[done:]], offset + done)
            except OSError as error:
                raise ExpertReadError(f"{self.path}: read error at byte {offset + done} ({error.strerror})") from error
            if count == 0:
                raise ExpertReadError(f"{self.path}: the file ends at byte {offset + done}; it has been truncated")
            done += count
            if done < needed and count % BLOCK_BYTES:
                raise ExpertReadError(f"{self.path}: the file ends at byte {offset + done}; it has been truncated")
        if not self._is_direct and not self._keep_pages:
            os.posix_fadvise(self._fd, offset, len(memory), os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """ExpertReadError if the file was written to since it was opened.

        A file *replaced* by another (a rename over it) is no trouble: the one opened lives on. Neither is one whose
        times were changed alone; see FileState.
        """
        try:
            unchanged = self._state.is_unchanged()
        except OSError as error:
            raise ExpertReadError(f"{self.path}: cannot be examined ({error.strerror})") from error
        if not unchanged:
            raise ExpertReadError(f"{self.path}: the file was changed while it was in use; restart the server")

    def close(self) -> None:
        os.close(self._fd)


def _open(path: Path) -> tuple[int, bool]:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False


def drop_cached_pages(path: Path) -> None:
    """Drop the file's pages from the page cache, except those that a process has mapped."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
