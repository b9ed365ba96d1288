"""Encoding: how a checkpoint stores a quantised matrix, and how its tensors become rows our kernel reads.

    rows     codes [N, K], one or two columns per byte; scales [N, G], [N / block, K / block] or one for all
    packed   the same in 32-bit words, first column in the low bits; zero points packed over rows  (compressed-tensors)
    blocks   codes [N, K / 32, 16] bytes                                                         (MXFP4)
    gptq     codes [K / 8, N] words of one column's consecutive rows; scales [G, N]               (AutoGPTQ, GPTQModel)
    awq      codes [K, N / 8] words of interleaved columns; scales [G, N]                         (AutoAWQ)

(N, K being the matrix as it multiplies, N outputs.) The first three are read where they lie; the last two store the
transposed matrix and are copied, as are matrices whose columns are in groups out of order, which become floats.
Knows no tensor names and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from moe_serve_kernels.cpu.coded import CodedRows
from moe_serve_kernels.quantized import BITS, SCALE_DTYPES, BlockRows, Kind, QuantizedRows

Layout = Literal["rows", "packed", "blocks", "gptq", "awq"]
ROLES = ("codes", "scale", "zero", "order", "factor")
"""Of a quantised matrix's tensors. factor: one number for all scales."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, of eight, of each nibble of a word from the low bits on."""
Matrix = torch.Tensor | QuantizedRows | BlockRows | CodedRows


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to store matrices, the same for all of a checkpoint."""

    layout: Layout
    kind: Kind
    group: int = 0
    """Columns that share a scale; 0: one scale per row."""
    rows_per_scale: int = 1
    """0: one scale for the whole matrix."""
    zero: int = 0
    """Zero point where none is stored."""
    zero_step: int = 0
    """Stored zero points are smaller by this (1 in GPTQ's first format)."""
    divides: bool = False
    """Scales are divided by the matrix's factor; else they are multiplied by it."""
    float_dtype: torch.dtype = torch.float32
    """Of matrices that must be dequantised."""

    @property
    def is_copied(self) -> bool:
        """The kernel cannot read what is stored."""
        return self.layout in ("gptq", "awq")

    @property
    def code_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the tensor with the codes; expert files hold bytes."""
        if self.layout in ("packed", "gptq", "awq"):
            return (torch.int32,)
        return (torch.uint8, *({"int8": (torch.int8,), "fp8": (torch.float8_e4m3fn,)}.get(self.kind, ())))

    def num_groups(self, columns: int) -> int:
        return -(-columns // self.group) if self.group else 1

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Role -> shape of the tensors of an [N, K] matrix; of scales their least number of dimensions."""
        bits, groups = BITS[self.kind], self.num_groups(columns)
        packed_rows, packed_columns = -(-rows * bits // 32), -(-columns * bits // 32)
        if self.layout == "packed":
            shapes = {"codes": (rows, packed_columns), "scale": (rows, groups), "zero": (packed_rows, groups)}
            return {**shapes, "order": (columns,)}
        if self.layout == "gptq":
            shapes = {"codes": (packed_columns, rows), "scale": (groups, rows), "zero": (groups, packed_rows)}
            return {**shapes, "order": (columns,)}
        if self.layout == "awq":
            return {"codes": (columns, packed_rows), "scale": (groups, rows), "zero": (groups, packed_rows)}
        scale = (-(-rows // (self.rows_per_scale or rows)), groups)
        codes = (rows, -(-columns // 32), 16) if self.layout == "blocks" else (rows, -(-columns * bits // 8))
        return {"codes": codes, "scale": scale, "zero": (rows, groups), "factor": (1,)}

    def matrix(self, tensors: Mapping[str, torch.Tensor], columns: int) -> Matrix:
        """[N, K] from a matrix's tensors by role: views, unless `is_copied` or there is an order of columns."""
        rows = self._rows(tensors, columns)
        order = tensors.get("order")
        return rows if order is None else _dequantized_in_order(rows, order.long(), self.float_dtype)

    def _rows(self, tensors: Mapping[str, torch.Tensor], columns: int) -> QuantizedRows:
        codes, scales, zeros = self._parts(tensors)
        if scales.dtype not in SCALE_DTYPES:
            scales = scales.to(torch.float32)
        group = self.group or columns
        rows_per_scale = self.rows_per_scale or codes.shape[0]
        zero = 0 if zeros is not None else self.zero
        factor = tensors.get("factor")
        factor = None if factor is None else factor.to(torch.float32)
        rows = QuantizedRows(self.kind, codes, scales, columns, group, rows_per_scale, zeros, zero)
        return rows if factor is None else replace(rows, factor=factor, divides=self.divides)

    def _parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes [N, bytes], scales [.., G] and zero points [N, G], row by row."""
        codes, scales, zeros = tensors["codes"], tensors["scale"], tensors.get("zero")
        if self.layout == "gptq":
            zeros = None if zeros is None else self._zeros_by_row(unpack(zeros, self.kind))
            return _bytes(codes.t().contiguous()), scales.t().contiguous(), zeros
        if self.layout == "awq":
            zeros = None if zeros is None else self._zeros_by_row(_in_awq_order(unpack(zeros, self.kind)))
            return pack_pairs(_in_awq_order(unpack(codes, self.kind)).t()), scales.t().contiguous(), zeros
        scales = scales.reshape(1, 1) if scales.numel() == 1 else scales.view(scales.shape[0], -1)
        if self.layout == "packed" and zeros is not None:
            zeros = unpack(zeros.t().contiguous(), self.kind).t()[: codes.shape[0]].contiguous()
        return _bytes(codes.flatten(1)), scales, zeros

    def _zeros_by_row(self, zeros: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = (zeros + self.zero_step) & (2 ** BITS[self.kind] - 1)
        return whole.t().contiguous()


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


def unpack(words: torch.Tensor, kind: Kind) -> torch.Tensor:
    """int32 [.., W] -> uint8 [.., W * codes per word], the low bits of a word first."""
    octets = _bytes(words.contiguous())
    if BITS[kind] == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K], K even, of four bits each -> [N, K / 2], the first of a pair in the low bits."""
    pairs: torch.Tensor = codes[:, ::2] | codes[:, 1::2] << 4
    return pairs.contiguous()


def _in_awq_order(codes: torch.Tensor) -> torch.Tensor:
    """[.., 8 W] as unpacked from words -> in the order of columns."""
    inverse = [AWQ_ORDER.index(i) for i in range(8)]
    return codes.view(*codes.shape[:-1], -1, 8)[..., inverse].flatten(-2)


def _dequantized_in_order(rows: QuantizedRows, group_of: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floats [N, K] of a matrix whose column k is in group group_of[k]."""
    unscaled = QuantizedRows(
        rows.kind, rows.codes, torch.ones(rows.shape[0], 1, device=rows.codes.device), rows.columns, rows.columns
    )
    scales = rows.scales.to(torch.float32)[:, group_of]
    zeros = rows.zero if rows.zeros is None else rows.zeros[:, group_of].to(torch.float32)
    return ((unscaled.dequantized() - zeros) * scales).to(dtype)
