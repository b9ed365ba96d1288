"""Tensors of a safetensors file as StoredTensors: mapped views, each with the place of its bytes.

The safetensors library maps the tensors; it does not say where they lie, so the header is read as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import safe_open

from expert_cache.storage.store import StoredTensor
from moe_serve_base.safetensors_header import read_header


def stored_tensors(file: Path, wanted: Callable[[str], bool]) -> Iterator[StoredTensor]:
    """Every tensor whose name is wanted; nothing of its contents is read.

    Raises SafetensorError, ValueError or OSError for a damaged file.
    """
    header, start = read_header(file)
    with safe_open(file, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 - safe_open is not a dict
            if wanted(name):
                yield StoredTensor(name, handle.get_tensor(name), file, start + header[name]["data_offsets"][0])
