"""One cached page or state as a file: a header that says what it is, a checksum, and the bytes.

A file that is not exactly that is refused. Knows bytes; knows no folder, no model and no tensors.

Layout: MAGIC (8), version (2), kind (2), bytes of payload (8), fingerprint (16), digest (16), checksum (16), payload.
The checksum covers everything but itself.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"moe-kv\r\n"
VERSION = 1
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


def payload_of(content: memoryview, label: Label, num_bytes: int) -> memoryview:
    """The payload of a file's `content`. ForeignFileError, DamagedFileError."""
    if content[: len(MAGIC)] != MAGIC:
        raise ForeignFileError("it does not begin as a file of this cache")
    if len(content) < HEADER.size:
        raise DamagedFileError(f"it ends after {len(content)} bytes")
    *fields, checksum = HEADER.unpack_from(content)
    if fields[1] != VERSION:
        raise ForeignFileError(f"its format is version {fields[1]}, not {VERSION}")
    expected = (MAGIC, VERSION, label.kind, num_bytes, label.fingerprint, label.digest)
    payload = content[HEADER.size :]
    if payload.nbytes != num_bytes:
        raise DamagedFileError(f"it holds {payload.nbytes} bytes of {num_bytes}")
    if tuple(fields) != expected:
        raise DamagedFileError("its header is not that of its name")
    if _checksum(expected, payload) != checksum:
        raise DamagedFileError("its checksum is wrong")
    return payload


def _checksum(fields: tuple[bytes | int, ...], payload: memoryview) -> bytes:
    found = hashlib.blake2b(repr(fields).encode(), digest_size=16)
    found.update(payload)
    return found.digest()
