"""Dense weights in 12-bit codes, behind the experts of a file that `moe-serve pack --lossless` made.

Tensor `dense.NAME` holds the codes of the checkpoint's tensor NAME, `dense.NAME_exponents` and `dense.NAME_rare` the
rest. The metadata has each matrix's columns and checksum. Knows no experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from expert_cache.storage.lossless import ROLES
from expert_cache.storage.safetensors_file import stored_tensors
from moe_serve_base.safetensors_header import read_header
from moe_serve_kernels.cpu.coded import CodedRows, encode, row_bytes

PREFIX = "dense."
METADATA = "dense"
"""The field of the metadata."""
DenseCodes = Mapping[str, CodedRows]
"""By the checkpoint's names of tensors."""


def coded(matrices: Iterable[tuple[str, torch.Tensor]]) -> dict[str, CodedRows]:
    """Those bf16 matrices [N, K] that take less memory in codes."""
    found = ((name, encode(matrix)) for name, matrix in matrices)
    return {name: codes for name, codes in found if codes is not None}


def tensors_of(dense: DenseCodes) -> Iterator[tuple[str, torch.Tensor]]:
    """In file order."""
    for name, matrix in dense.items():
        yield f"{PREFIX}{name}", matrix.codes
        yield from ((f"{PREFIX}{name}_{role}", getattr(matrix, role)) for role in ROLES)


def note(dense: DenseCodes) -> str:
    """The metadata's field."""
    return json.dumps({name: [matrix.columns, _checksum(matrix)] for name, matrix in dense.items()})


def octets(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes."""
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data


def read(path: Path) -> dict[str, CodedRows]:
    """Mapped; none for a file without. ValueError names a matrix that lacks a part. OSError."""
    header, _ = read_header(path)
    notes: dict[str, Any] = json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))
    found = {each.name: each.tensor for each in stored_tensors(path, lambda name: name.startswith(PREFIX))}
    return {name: _matrix(name, columns, found) for name, (columns, _) in notes.items()}


def refuse_damage(path: Path, dense: DenseCodes) -> None:
    """ValueError names a matrix of `read` that is damaged; all are read for that."""
    header, _ = read_header(path)
    notes = json.loads(header["__metadata__"][METADATA]) if dense else {}
    for name, matrix in dense.items():
        if (problem := matrix.damage()) is not None or _checksum(matrix) != notes[name][1]:
            raise ValueError(f"{name}: {problem or 'the checksum is wrong'}; the file is damaged, make it again")


def _matrix(name: str, columns: int, found: Mapping[str, torch.Tensor]) -> CodedRows:
    stored = f"{PREFIX}{name}"
    parts = [found.get(each) for each in (stored, *(f"{stored}_{role}" for role in ROLES))]
    codes, exponents, rare = parts
    if codes is None or exponents is None or rare is None or codes.dim() != 2 or codes.shape[1] != row_bytes(columns):
        raise ValueError(f"{name}: a part of its codes is missing; the file is damaged, make it again")
    return CodedRows(codes, exponents, rare, columns)


def _checksum(matrix: CodedRows) -> str:
    digest = xxhash.xxh3_64()
    for tensor in matrix.tensors:
        digest.update(octets(tensor))
    return digest.hexdigest()
