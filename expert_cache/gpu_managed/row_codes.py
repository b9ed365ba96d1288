"""Matrices with their inputs innermost, as a checkpoint stores them, in a slot: floats, int8 or fp8 codes.

Shape alphabet: N outputs of a matrix, G groups of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from moe_serve_kernels.cpu.expert_mlp import Matrix, as_tensor
from moe_serve_kernels.gpu.weight_format import Format, weight_format
from moe_serve_kernels.quantized import QuantizedRows

BYTES: dict[tuple[str, int], Format] = {("int8", 0): "int8", ("uint8", 128): "int8", ("fp8", 0): "fp8"}
"""By kind and zero point, with a scale per output."""
GROUPED: dict[Format, Format] = {"int8": "int8_groups", "fp8": "fp8_blocks"}
"""The same codes with a scale per group."""


def formats_of(matrix: QuantizedRows) -> Iterator[Format]:
    """The formats that hold the matrix's codes as they are; one group of all inputs is a scale per output as well."""
    per_output = BYTES.get((matrix.kind, matrix.zero))
    if per_output is None or matrix.zeros is not None:
        return
    if matrix.num_groups == 1 and matrix.rows_per_scale in (1, matrix.shape[0]):
        yield per_output
    grouped = weight_format(GROUPED[per_output])
    if matrix.group in grouped.groups and matrix.rows_per_scale == grouped.rows_per_scale:
        yield GROUPED[per_output]


def write_floats(matrix: Matrix, target: Mapping[str, torch.Tensor]) -> None:
    """A matrix of any kind as floats."""
    data = target["data"]
    data.copy_(as_tensor(matrix, data.dtype), non_blocking=True)


def write_codes(matrix: QuantizedRows, target: Mapping[str, torch.Tensor]) -> None:
    """A matrix of BYTES. Its scales are [N], or [G, N / rows that share one]."""
    codes = matrix.codes[:, : matrix.columns]
    target["data"].view(torch.uint8).copy_(codes ^ 128 if matrix.kind == "uint8" else codes, non_blocking=True)
    scales, places = matrix.scale_values(), target["scale"]
    places.copy_(scales[:, 0].expand(matrix.shape[0]) if places.dim() == 1 else scales.t(), non_blocking=True)
