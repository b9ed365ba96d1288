"""Tensors of a safetensors file as StoredTensors: mapped views, each with the place of its bytes.

The safetensors library maps the tensors; it does not say where they lie, so the header (a length and
JSON, see the format's README) is read here as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from expert_cache.storage.store import StoredTensor

LENGTH_BYTES = 8
"""A little-endian integer before the header: the header's length."""


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(header, offset of the first tensor byte). ValueError or OSError if this is no safetensors file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if length > file.stat().st_size:
            raise ValueError(f"header of {length} bytes in a file of {file.stat().st_size}")
        return json.loads(stream.read(length)), LENGTH_BYTES + length


def stored_tensors(file: Path, wanted: Callable[[str], bool]) -> Iterator[StoredTensor]:
    """Every tensor whose name is wanted; nothing of its contents is read.

    Raises SafetensorError, ValueError or OSError for a damaged file.
    """
    header, start = read_header(file)
    with safe_open(file, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 - safe_open is not a dict
            if wanted(name):
                yield StoredTensor(name, handle.get_tensor(name), file, start + header[name]["data_offsets"][0])
