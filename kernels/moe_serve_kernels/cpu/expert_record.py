"""Where one expert's weights lie, as the C++ kernels read it: struct Expert in native/experts/segments.h.

A linear layer is an expert that has only `down`. Nothing is copied: the tensors must stay where they are while a
record is in use.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from moe_serve_kernels.cpu.library import native
from moe_serve_kernels.quantized import BlockRows, QuantizedRows

Matrix = torch.Tensor | QuantizedRows | BlockRows


class ExpertRecord:
    """One struct Expert in memory of its own."""

    __slots__ = ("_memory", "address")

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.address = ctypes.addressof(memory)

    @staticmethod
    def of(
        kind: str,
        gate: Matrix | None,
        up: Matrix | None,
        down: Matrix,
        gate_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> ExpertRecord:
        """`kind`: that of all three matrices, a WeightKind in any case. Biases float32 or bf16, any stride."""
        memory = native().new(
            "Expert",
            gate=_matrix(gate),
            up=_matrix(up),
            down=_matrix(down),
            gate_bias=_bias(gate_bias),
            up_bias=_bias(up_bias),
            down_bias=_bias(down_bias),
            kind=native().value(f"WeightKind.{kind}"),
        )
        return ExpertRecord(memory)


def _matrix(matrix: Matrix | None) -> Any:
    if isinstance(matrix, QuantizedRows):
        return _quantized(matrix)
    plain = {"scales": None, "scale_kind": 0, "scale_stride": 0, "rows_per_scale": 1}
    plain |= {"zeros": None, "zero_stride": 0, "zero": 0, "block_type": 0}
    if matrix is None:
        return native().new("Matrix", data=None, stride=0, rows=0, columns=0, group=0, **plain)
    rows, columns = matrix.shape
    data = matrix.blocks if isinstance(matrix, BlockRows) else matrix
    if isinstance(matrix, BlockRows):
        plain["block_type"] = native().value(f"BlockType.BLOCK_{matrix.type}")
    stride = data.stride(0) * data.itemsize
    return native().new(
        "Matrix", data=data.data_ptr(), stride=stride, rows=rows, columns=columns, group=columns, **plain
    )


def _quantized(matrix: QuantizedRows) -> Any:
    rows, columns = matrix.shape
    zeros = matrix.zeros
    return native().new(
        "Matrix",
        data=matrix.codes.data_ptr(),
        stride=matrix.codes.stride(0),
        rows=rows,
        columns=columns,
        scales=matrix.scales.data_ptr(),
        scale_kind=native().value(f"ScaleKind.SCALE_{str(matrix.scales.dtype).removeprefix('torch.')}"),
        scale_stride=matrix.scales.stride(0),
        rows_per_scale=matrix.rows_per_scale,
        group=matrix.group,
        zeros=None if zeros is None else zeros.data_ptr(),
        zero_stride=0 if zeros is None else zeros.stride(0),
        zero=(matrix.zero if zeros is None else 0) - (128 if matrix.kind == "uint8" else 0),
        block_type=0,
    )


def _bias(bias: torch.Tensor | None) -> Any:
    if bias is None:
        return native().new("Bias", data=None, stride=0, bf16=0)
    assert bias.dtype in (torch.float32, torch.bfloat16)
    return native().new("Bias", data=bias.data_ptr(), stride=bias.stride(0), bf16=bias.dtype == torch.bfloat16)
