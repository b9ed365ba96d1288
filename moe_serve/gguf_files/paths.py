"""Which files a GGUF checkpoint consists of: one, or the numbered parts that llama.cpp's `gguf-split` writes.

Looks at names only.
"""

from __future__ import annotations

import re
from pathlib import Path

from moe_serve.errors import CheckpointError

SUFFIX = ".gguf"
LISTING = "tensors.json"
"""In the folder that stands for a checkpoint (folder.py)."""
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
PROJECTOR = "mmproj"
"""Begins the names of vision towers, which lie beside models."""


def parts_of(file: Path) -> list[Path]:
    """All files of the checkpoint that `file` belongs to, in order. CheckpointError names a missing part."""
    match = PART.match(file.name)
    if match is None:
        return [file]
    count = int(match["count"])
    parts = [file.with_name(f"{match['stem']}-{i:05}-of-{count:05}{SUFFIX}") for i in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{part}: this part of {file.name} is missing; download all {count} parts")
    return parts


def only_gguf_in(folder: Path) -> Path | None:
    """The one GGUF checkpoint of a folder, None where there is none. CheckpointError where there are several."""
    found = {parts_of(file)[0] for file in sorted(folder.glob(f"*{SUFFIX}")) if not file.name.startswith(PROJECTOR)}
    if len(found) > 1:
        names = ", ".join(sorted(file.name for file in found))
        raise CheckpointError(f"{folder} holds {len(found)} GGUF models; give the path of one of them: {names}")
    return next(iter(found), None)


def name_of(file: Path) -> str:
    """What to call the model: the file's name without the part's number."""
    match = PART.match(file.name)
    return match["stem"] if match else file.name.removesuffix(SUFFIX)
