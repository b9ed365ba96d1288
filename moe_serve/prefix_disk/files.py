"""One cached page or state as a file: a header that says what it is, a checksum, and the bytes.

A file that is not exactly that is refused. Knows bytes; knows no folder, no model and no tensors.

Layout: MAGIC (8), version (2), kind (2), bytes of payload (8), fingerprint (16), digest (16), checksum (16), payload.
The checksum covers everything but itself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import xxhash

MAGIC = b"moe-kv\r\n"
VERSION = 2
HEADER = struct.Struct("<8sHHQ16s16s16s")


class Kind(IntEnum):
    """What a file holds; also the end of its name."""

    PAGE = 1
    STATE = 2

    @property
    def suffix(self) -> str:
        return f".{self.name.lower()}"


class ForeignFileError(Exception):
    """Not a file of ours: it is left where it is."""


class DamagedFileError(Exception):
    """A file of ours whose bytes are not those that were written."""


@dataclass(frozen=True, slots=True)
class Label:
    """What a file must say of itself."""

    kind: Kind
    fingerprint: bytes
    """Of the model and how it computes, 16 bytes."""
    digest: bytes
    """Prefix hash of the page, or of the page where the state was taken, 16 bytes."""


def header(label: Label, payload: memoryview) -> bytes:
    """What stands before the payload."""
    fields = (MAGIC, VERSION, label.kind, payload.nbytes, label.fingerprint, label.digest)
    return HEADER.pack(*fields, _checksum(fields, payload))


def check(head: bytearray, payload: memoryview, num_read: int, label: Label) -> None:
    """That a file is as it was written. `head` and `payload` are its first bytes, and `num_read` is more than their sum
    if it is longer. ForeignFileError, DamagedFileError."""
    if head[: min(num_read, len(MAGIC))] != MAGIC:
        raise ForeignFileError("it does not begin as a file of this cache")
    if num_read < HEADER.size:
        raise DamagedFileError(f"it ends after {num_read} bytes")
    *fields, checksum = HEADER.unpack(head)
    if fields[1] != VERSION:
        raise ForeignFileError(f"its format is version {fields[1]}, not {VERSION}")
    expected = (MAGIC, VERSION, label.kind, payload.nbytes, label.fingerprint, label.digest)
    if num_read != HEADER.size + payload.nbytes:
        raise DamagedFileError(f"it does not hold {payload.nbytes} bytes")
    if tuple(fields) != expected:
        raise DamagedFileError("its header is not that of its name")
    if _checksum(expected, payload) != checksum:
        raise DamagedFileError("its checksum is wrong")


def _checksum(fields: tuple[bytes | int, ...], payload: memoryview) -> bytes:
    """Finds accidents. It is as quick as memory; a cryptographic one took a third of a load's time."""
    found = xxhash.xxh3_128(repr(fields).encode())
    found.update(payload)
    return found.digest()
