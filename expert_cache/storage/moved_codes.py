"""A GPU converts experts by itself: their codes go there first, and are relaid or become floats there.

On a CPU that takes minutes for billions of codes. Only codes move: floats are copied into slots as they are, and a
library on the CPU reads ggml's blocks. Knows no layout and no cache.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from expert_cache.storage.encoding import Matrix
from expert_cache.storage.store import ExpertWeights
from moe_serve_kernels.quantized import QuantizedRows


def codes_on(device: torch.device, weights: ExpertWeights) -> ExpertWeights:
    """The expert with its codes on `device`; `weights` itself if they are there, or if it has none."""
    matrices = (weights.gate, weights.up, weights.down)
    if not any(isinstance(matrix, QuantizedRows) and matrix.codes.device != device for matrix in matrices):
        return weights
    gate, up, down = (_moved(matrix, device) for matrix in matrices)
    return ExpertWeights(gate, up, down, weights.gate_bias, weights.up_bias, weights.down_bias)


def _moved(matrix: Matrix, device: torch.device) -> Matrix:
    if not isinstance(matrix, QuantizedRows):
        return matrix
    zeros, factor = (None if part is None else part.to(device) for part in (matrix.zeros, matrix.factor))
    codes, scales = matrix.codes.to(device), matrix.scales.to(device)
    return replace(matrix, codes=codes, scales=scales, zeros=zeros, factor=factor)
