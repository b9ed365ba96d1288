"""Where one expert's weights lie, as the C++ kernels read it: struct Expert in native/experts/segments.h.

A linear layer is an expert that has only `down`. Nothing is copied: the tensors must stay where they are while a
record is in use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from moe_serve_kernels.cpu.coded import CodedRows
from moe_serve_kernels.cpu.library import native
from moe_serve_kernels.quantized import BlockRows, QuantizedRows

Matrix = torch.Tensor | QuantizedRows | BlockRows | CodedRows
PLAIN = {
    **{"scales": None, "scale_kind": 0, "scale_stride": 0, "rows_per_scale": 1, "scale_table": None},
    **{"zeros": None, "zero_stride": 0, "zero": 0, "block_type": 0},
    **{"exponents": None, "rare": None, "rare_size": 0},
}
"""Fields of struct Matrix that floats leave empty."""


class ExpertRecord:
    """One struct Expert in memory of its own."""

    __slots__ = ("_memory", "_tables", "address")

    def __init__(self, memory: Any, tables: Sequence[torch.Tensor | None]) -> None:
        self._memory, self._tables = memory, tables
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
        tables = [_table_of(matrix) for matrix in (gate, up, down)]
        memory = native().new(
            "Expert",
            gate=_matrix(gate, tables[0]),
            up=_matrix(up, tables[1]),
            down=_matrix(down, tables[2]),
            gate_bias=_bias(gate_bias),
            up_bias=_bias(up_bias),
            down_bias=_bias(down_bias),
            kind=native().value(f"WeightKind.{kind}"),
        )
        return ExpertRecord(memory, tables)


def _table_of(matrix: Matrix | None) -> torch.Tensor | None:
    """float32 [256]: what each e4m3 scale of the matrix stands for, by its byte."""
    if not isinstance(matrix, QuantizedRows) or matrix.scales.dtype != torch.float8_e4m3fn:
        return None
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    return matrix.with_factor(scales).contiguous()


def _matrix(matrix: Matrix | None, table: torch.Tensor | None) -> Any:
    if isinstance(matrix, QuantizedRows):
        return _quantized(matrix, table)
    if matrix is None:
        return native().new("Matrix", data=None, stride=0, rows=0, columns=0, group=0, **PLAIN)
    rows, columns = matrix.shape
    data, fields = _rows(matrix)
    stride = data.stride(0) * data.itemsize
    fields |= {"data": data.data_ptr(), "stride": stride, "rows": rows, "columns": columns, "group": columns}
    return native().new("Matrix", **PLAIN | fields)


def _rows(matrix: torch.Tensor | BlockRows | CodedRows) -> tuple[torch.Tensor, dict[str, Any]]:
    """What holds the rows, and the fields that say how."""
    if isinstance(matrix, BlockRows):
        return matrix.blocks, {"block_type": native().value(f"BlockType.BLOCK_{matrix.type}")}
    if isinstance(matrix, CodedRows):
        exponents, rare = matrix.exponents.data_ptr(), matrix.rare.data_ptr()
        return matrix.codes, {"exponents": exponents, "rare": rare, "rare_size": len(matrix.rare)}
    return matrix, {}


def _quantized(matrix: QuantizedRows, table: torch.Tensor | None) -> Any:
    rows, columns = matrix.shape
    zeros = matrix.zeros
    scale_kind = "table" if table is not None else str(matrix.scales.dtype).removeprefix("torch.")
    fields = {
        "data": matrix.codes.data_ptr(),
        "stride": matrix.codes.stride(0),
        "rows": rows,
        "columns": columns,
        "scales": matrix.scales.data_ptr(),
        "scale_kind": native().value(f"ScaleKind.SCALE_{scale_kind}"),
        "scale_stride": matrix.scales.stride(0),
        "rows_per_scale": matrix.rows_per_scale,
        "group": matrix.group,
        "zeros": None if zeros is None else zeros.data_ptr(),
        "zero_stride": 0 if zeros is None else zeros.stride(0),
        "zero": (matrix.zero if zeros is None else 0) - (128 if matrix.kind == "uint8" else 0),
        "scale_table": None if table is None else table.data_ptr(),
    }
    return native().new("Matrix", **PLAIN | fields)


def _bias(bias: torch.Tensor | None) -> Any:
    if bias is None:
        return native().new("Bias", data=None, stride=0, bf16=0)
    assert bias.dtype in (torch.float32, torch.bfloat16)
    return native().new("Bias", data=bias.data_ptr(), stride=bias.stride(0), bf16=bias.dtype == torch.bfloat16)
