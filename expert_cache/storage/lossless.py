"""What an expert file made with `moe-serve pack --lossless` holds: bf16 matrices in 12-bit codes.

A matrix that would take no less memory in codes stays as it is. Sizes therefore differ from expert to expert. Says what
is wrong with a file whose codes do not fit together, before a kernel reads them. Knows no layout of files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from expert_cache.storage.encoding import Matrix
from expert_cache.storage.store import ExpertStore, ExpertWeights, StoredTensor, matrices_of
from moe_serve_kernels.cpu.coded import NUM_INDICES, CodedRows, encode, row_bytes
from predictors.shape import Key

MATRICES = ("gate", "up", "down")
ROLES = ("exponents", "rare")
"""Of a coded matrix's tensors, beside its codes."""


def coded(weights: ExpertWeights) -> ExpertWeights:
    """The same expert with every matrix in codes that takes less memory so."""
    gate, up, down = (encode(_plain(matrix)) or matrix for matrix in matrices_of(weights))
    return dataclasses.replace(weights, gate=gate, up=up, down=down)


def largest(weights: ExpertWeights) -> ExpertWeights:
    """Tensors without contents, none of them smaller than those of `coded`."""
    gate, up, down = (_largest(_plain(matrix)) for matrix in matrices_of(weights))
    return dataclasses.replace(weights, gate=gate, up=up, down=down)


def _plain(matrix: Matrix) -> torch.Tensor:
    assert isinstance(matrix, torch.Tensor)
    return matrix


def _largest(matrix: torch.Tensor) -> CodedRows:
    num_rows, columns = matrix.shape
    codes = torch.empty(num_rows, row_bytes(columns), dtype=torch.uint8, device="meta")
    exponents = torch.empty(NUM_INDICES, dtype=torch.uint8, device="meta")
    return CodedRows(codes, exponents, torch.empty(matrix.numel(), dtype=torch.int32, device="meta"), columns)


def is_bf16(store: ExpertStore) -> bool:
    """Whether all matrices of all experts are plain bf16."""
    return all(
        isinstance(matrix, torch.Tensor) and matrix.dtype == torch.bfloat16
        for layer in store.layers
        for matrix in matrices_of(store.weights(layer, 0))
    )


def refuse_damage(store: ExpertStore) -> None:
    """ValueError names the expert and the matrix whose codes do not fit together. Reads the lists of rare weights."""
    for layer in store.layers:
        for expert in range(store.num_experts):
            _refuse_damaged_expert(store, (layer, expert))


def _refuse_damaged_expert(store: ExpertStore, key: Key) -> None:
    parts = store.parts(*key)
    for part in MATRICES:
        problem = _wrong_shape(parts, part, store.shape)
        if problem is None and f"{part}_exponents" in parts:
            matrix = getattr(store.weights(*key), part)
            assert isinstance(matrix, CodedRows)
            problem = matrix.damage()
        if problem is not None:
            raise ValueError(f"{store.name(*key)}, {part}: {problem}; the file is damaged, make it again")


def _wrong_shape(parts: Mapping[str, StoredTensor], part: str, shape: tuple[int, int]) -> str | None:
    """What the header says of a matrix that cannot be."""
    names = [f"{part}_{role}" for role in ROLES]
    if part not in parts or any((name in parts) != (names[0] in parts) for name in names):
        return "a part of it is missing"
    if names[0] not in parts:
        return None
    inner, hidden = shape
    rows, columns = (hidden, inner) if part == "down" else (inner, hidden)
    wanted = {part: ((rows, row_bytes(columns)), torch.uint8), names[0]: ((NUM_INDICES,), torch.uint8)}
    wanted[names[1]] = (tuple(parts[names[1]].tensor.shape[:1]), torch.int32)
    for name, (size, dtype) in wanted.items():
        tensor = parts[name].tensor
        if tuple(tensor.shape) != size or tensor.dtype != dtype:
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {size}"
    return None
