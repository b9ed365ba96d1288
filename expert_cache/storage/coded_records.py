"""bf16 experts in 12-bit codes as the records that a GPU reads from pinned memory (moe_serve_kernels.gpu.coded_link).

Knows no cache and no memory but the record that it fills.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expert_cache.storage.store import ExpertStore, ExpertWeights
from moe_serve_kernels.cpu.coded import CodedRows

if TYPE_CHECKING:  # needs triton, which few machines without a GPU have
    from moe_serve_kernels.gpu.coded_link import RecordLayout


def record_layout(store: ExpertStore, slot_bytes: int) -> RecordLayout | None:
    """The layout of a store's records, or None where not all matrices are coded, or the longest lists of rare weights
    make records no smaller than `slot_bytes`."""
    first = _coded(store.weights(store.layers[0], 0))
    if first is None:
        return None
    most = [0, 0, 0]
    for layer in store.layers:
        for expert in range(store.num_experts):
            matrices = _coded(store.weights(layer, expert))
            if matrices is None:
                return None
            most = [max(m, len(matrix.rare)) for m, matrix in zip(most, matrices, strict=True)]
    from moe_serve_kernels.gpu.coded_link import RecordLayout

    records = RecordLayout(tuple(matrix.shape for matrix in first), tuple(most))
    return records if records.num_bytes < slot_bytes else None


def write_record(weights: ExpertWeights, layout: RecordLayout, record: torch.Tensor) -> None:
    """Fill a record, uint8 [bytes]."""
    matrices = _coded(weights)
    assert matrices is not None
    for matrix, places in zip(matrices, layout.places(), strict=True):
        for tensor, place in zip((matrix.codes, matrix.exponents, matrix.rare), places, strict=True):
            flat = tensor.contiguous().view(torch.uint8).flatten()
            record[place : place + len(flat)].copy_(flat)


def _coded(weights: ExpertWeights) -> list[CodedRows] | None:
    """Gate, up and down, where all are coded."""
    matrices = [matrix for matrix in (weights.gate, weights.up, weights.down) if isinstance(matrix, CodedRows)]
    return matrices if len(matrices) == 3 else None
