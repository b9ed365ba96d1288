"""PrefixFolder: the files of one model's cached prefixes, within a budget of bytes; the least recently used go first.

The budget includes what other models, or this one with other settings, have left in the same folder. Only files with
names of this cache, below folders named after fingerprints, are read, counted or removed.
Methods may be called from several threads. Knows files and bytes; knows no pages and no tensors.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from moe_serve.prefix_disk.files import HEADER, DamagedFileError, ForeignFileError, Kind, Label, check, header
from moe_serve.prefix_disk.other_folders import Key, OtherFolders, cache_files, key_of
from moe_serve.scheduling.stats import DiskTotals
from moe_serve_base.whole_files import OutputError, whole_file

log = logging.getLogger(__name__)


class PrefixFolder:
    """`<folder>/<fingerprint>/<digest>.page` and `.state`."""

    def __init__(self, folder: Path, fingerprint: bytes, budget_bytes: int) -> None:
        """Makes the folder. OSError."""
        self.path = folder / fingerprint.hex()
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fingerprint = fingerprint
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self.totals = DiskTotals()
        self._sizes: OrderedDict[Key, int] = OrderedDict(self._listed())
        """Bytes of each file, least recently used first."""
        self.totals.num_bytes = sum(self._sizes.values())
        self._others = OtherFolders(folder, self.path)
        self._is_full = False
        self._make_room(0)

    def _listed(self) -> list[tuple[Key, int]]:
        found = sorted(cache_files(self.path))
        return [(key_of(path.name), size) for _, path, size in found]

    def has(self, kind: Kind, digest: bytes) -> bool:
        return (kind, digest) in self._sizes

    def write(self, kind: Kind, digest: bytes, payload: memoryview) -> None:
        """Keep a payload, if the disk has room. Nothing is raised: the first error is logged, and ends writing."""
        size = HEADER.size + payload.nbytes
        if self._is_full or self.has(kind, digest) or size > self._budget_bytes:
            return
        with self._lock:
            self._make_room(size)
        try:
            self._write(self._path(kind, digest), header(Label(kind, self._fingerprint, digest), payload), payload)
        except OutputError as error:
            self._is_full = True
            what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            log.warning("prefixes are no longer written to %s: %s", self.path, what)
            return
        with self._lock:
            self._sizes[kind, digest] = size
            self.totals.num_bytes += size
            self.totals.written_bytes += size

    def _write(self, path: Path, head: bytes, payload: memoryview) -> None:
        with whole_file(path) as partial, open(partial, "wb", opener=_private) as stream:
            stream.write(head)
            stream.write(payload)

    def read(self, kind: Kind, digest: bytes, payload: memoryview) -> bool:
        """Fill `payload` with what was written; False, and a line in the log, if the file is not as it was written."""
        try:
            self._read(self._path(kind, digest), Label(kind, self._fingerprint, digest), payload)
        except FileNotFoundError:
            self._forget(kind, digest)
            return False
        except (OSError, ForeignFileError, DamagedFileError) as error:
            self._refuse(kind, digest, error)
            return False
        self.totals.read_bytes += HEADER.size + payload.nbytes
        return True

    def _read(self, path: Path, label: Label, payload: memoryview) -> None:
        head, beyond = bytearray(HEADER.size), bytearray(1)
        with path.open("rb", buffering=0) as stream:
            num_read = os.readv(stream.fileno(), [head, payload, beyond])
        check(head, payload, num_read, label)

    def touch(self, keys: Sequence[Key]) -> None:
        """A sequence has used these, in its order. Its last page goes first: a prefix is of use from its beginning."""
        for key in reversed(keys):
            with self._lock:
                if key not in self._sizes:
                    continue
                self._sizes.move_to_end(key)
            with contextlib.suppress(OSError):
                os.utime(self._path(*key))

    def _refuse(self, kind: Kind, digest: bytes, error: Exception) -> None:
        path, is_ours = self._path(kind, digest), isinstance(error, DamagedFileError)
        log.warning("%s is ignored%s: %s", path, " and removed" if is_ours else "", error)
        if is_ours:
            path.unlink(missing_ok=True)
        self._forget(kind, digest)
        self.totals.refused_files += 1

    def _forget(self, kind: Kind, digest: bytes) -> None:
        with self._lock:
            self.totals.num_bytes -= self._sizes.pop((kind, digest), 0)

    def _make_room(self, size: int) -> None:
        """Remove files until `size` more bytes fit; those of other models first, because no sequence here uses them."""
        self._others.shrink(self._budget_bytes - self.totals.num_bytes - size)
        while self._sizes and self.totals.num_bytes + size > self._budget_bytes:
            key, freed = self._sizes.popitem(last=False)
            self.totals.num_bytes -= freed
            self._path(*key).unlink(missing_ok=True)

    def _path(self, kind: Kind, digest: bytes) -> Path:
        return self.path / (digest.hex() + kind.suffix)


def _private(path: str, flags: int) -> int:
    """Prompts can be read back from keys and values: the owner alone may."""
    return os.open(path, flags, 0o600)
