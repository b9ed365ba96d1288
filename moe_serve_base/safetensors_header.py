"""The header of a safetensors file: a length and JSON (see the format's README). Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LENGTH_BYTES = 8
"""A little-endian integer before the header: the header's length."""


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(header, offset of the first tensor byte). ValueError or OSError if this is no safetensors file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if length > file.stat().st_size:
            raise ValueError(f"header of {length} bytes in a file of {file.stat().st_size}")
        return json.loads(stream.read(length)), LENGTH_BYTES + length
