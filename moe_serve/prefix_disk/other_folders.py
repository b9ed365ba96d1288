"""OtherFolders: cached prefixes that other models have left beside those of the served one, the oldest first.

A new version, or another file of weights, has another fingerprint: without this its folder would stay for ever. Knows
files and bytes; knows no pages.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from moe_serve.prefix_disk.files import Kind

FOLDER = re.compile(r"[0-9a-f]{32}")
NAME = re.compile(r"(?P<digest>[0-9a-f]{32})\.(?P<kind>page|state)")
Key = tuple[Kind, bytes]
"""What a file holds, and the digest of its prefix."""


class OtherFolders:
    """The files below `root` that are of this cache but not in `own`, as they were when this was made."""

    def __init__(self, root: Path, own: Path) -> None:
        """OSError if `root` cannot be listed."""
        with os.scandir(root) as entries:
            folders = [Path(e.path) for e in entries if FOLDER.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        self._files = deque(sorted(file for folder in folders if folder != own for file in _readable(folder)))
        self.num_bytes = sum(size for _, _, size in self._files)

    def shrink(self, most_bytes: int) -> None:
        """Remove the oldest files until `most_bytes` are left, and folders that are empty then."""
        while self._files and self.num_bytes > most_bytes:
            _, path, size = self._files.popleft()
            self.num_bytes -= size
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()


def cache_files(folder: Path) -> Iterator[tuple[int, Path, int]]:
    """(time of last use in ns, path, bytes) of each file whose name is one of this cache. OSError."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                yield entry.stat().st_mtime_ns, Path(entry.path), entry.stat().st_size


def key_of(name: str) -> Key:
    """What the file of this name holds."""
    digest, _, kind = name.partition(".")
    return Kind[kind.upper()], bytes.fromhex(digest)


def _readable(folder: Path) -> list[tuple[int, Path, int]]:
    """None of a folder that another process is removing, or that is another user's."""
    try:
        return list(cache_files(folder))
    except OSError:
        return []
