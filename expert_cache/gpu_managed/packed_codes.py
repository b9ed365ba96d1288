"""Four-bit codes in a slot: outputs innermost, the two halves of a kernel's loop step in the low and high nibbles.

Shape alphabet: N outputs, G groups of inputs, g inputs of a group, Z loop steps, z inputs of half a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from moe_serve_kernels.gpu.pool import pack
from moe_serve_kernels.gpu.weight_format import Format, weight_format
from moe_serve_kernels.quantized import QuantizedRows

FLOATS: dict[torch.dtype, Format] = {torch.uint8: "mxfp4", torch.float8_e4m3fn: "nvfp4"}
"""Of four-bit floats, by the type of their scales."""


def formats_of(matrix: QuantizedRows) -> Iterator[Format]:
    """The formats that hold the matrix's codes as they are."""
    name: Format | None = "int4" if matrix.kind == "int4" else None
    if matrix.kind == "fp4" and matrix.zeros is None and matrix.zero == 0:
        name = FLOATS.get(matrix.scales.dtype)
    if name is None or matrix.rows_per_scale != 1 or matrix.columns % matrix.group:
        return
    form = weight_format(name)
    if matrix.group in form.groups and form.refusal(matrix.columns, matrix.group) is None:
        yield name


def write(matrices: Sequence[QuantizedRows], format: Format, target: Mapping[str, torch.Tensor]) -> None:
    """Matrices of one format, one below the other."""
    half = weight_format(format).half(matrices[0].group)
    codes = torch.cat([_halves(matrix, half) for matrix in matrices])
    target["data"].copy_(pack(codes[:, :, 0], codes[:, :, 1]), non_blocking=True)
    if format == "int4":
        scales = [matrix.scale_values() for matrix in matrices]
        zeros = [_zeros(matrix) for matrix in matrices]
        target["zero"].copy_(torch.cat(zeros).t(), non_blocking=True)
    else:
        scales = [matrix.scales.view(torch.uint8) for matrix in matrices]
    target["scale"].copy_(torch.cat(scales).t(), non_blocking=True)
    if format == "nvfp4":
        factors = torch.cat([_factor(matrix) for matrix in matrices])
        target["factor"].copy_(factors.view(target["factor"].shape), non_blocking=True)


def _halves(matrix: QuantizedRows, half: int) -> torch.Tensor:
    """uint8 [N, Z, 2, z]"""
    codes = torch.stack((matrix.codes & 15, matrix.codes >> 4), dim=2).flatten(1)[:, : matrix.columns]
    return codes.reshape(len(codes), -1, 2, half)


def _zeros(matrix: QuantizedRows) -> torch.Tensor:
    """float32 [N, G]"""
    if matrix.zeros is not None:
        return matrix.zeros.float()
    return torch.full(matrix.scales.shape, float(matrix.zero), device=matrix.codes.device)


def _factor(matrix: QuantizedRows) -> torch.Tensor:
    """float32 [N]: what all scales are multiplied by."""
    return matrix.with_factor(torch.ones(1, device=matrix.codes.device)).expand(len(matrix.codes))
