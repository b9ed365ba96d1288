"""What cached prefixes depend on, as 16 bytes: the model's files and everything that changes a bit of keys and values.

A fingerprint that changes too often costs a cache; one that changes too seldom would cost right answers. So a file's
time is part of it, beside its size and samples of its content. Knows files and settings; knows no pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

SAMPLES = 64
"""Blocks of a file that are read, at equal distances, the first and the last among them."""
SAMPLE_BYTES = 4096


def fingerprint(files: Iterable[Path], facts: Mapping[str, object]) -> bytes:
    """`facts`: settings, versions and shapes, by name. OSError if a file cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for file in sorted(files):
        digest.update(file_identity(file))
    return digest.digest()


def file_identity(file: Path) -> bytes:
    """Name, size, time and samples of the content."""
    known = file.stat()
    digest = hashlib.blake2b(f"{file.name}\0{known.st_size}\0{known.st_mtime_ns}\0".encode(), digest_size=16)
    last = max(0, known.st_size - SAMPLE_BYTES)
    with file.open("rb") as stream:
        for place in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
            stream.seek(place)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()
