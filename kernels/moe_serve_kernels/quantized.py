"""QuantizedRows: a weight matrix as integer or small floating point codes with scales, row by row.

    weight[n, k] = (code[n, k] - zero[n, k // group]) * scale[n // rows_per_scale, k // group]

What checkpoints in compressed-tensors, block-scaled fp8 and MXFP4 formats store, as views of it: nothing is
converted. BlockRows is the same for what GGUF files store: ggml's blocks, each with the codes of 32 or 256 columns
and their scales side by side. What a block stands for is ggml's definition, for which the `gguf` package is the
reference. Knows no checkpoint format.

Shape alphabet: N rows (outputs), K columns (inputs), G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

Kind = Literal["int8", "uint8", "fp8", "int4", "fp4"]
KINDS: tuple[str, ...] = get_args(Kind)
BITS: dict[str, int] = {"int8": 8, "uint8": 8, "fp8": 8, "int4": 4, "fp4": 4}
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn)
"""uint8: e8m0, 2^(byte - 127)."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""e2m1, by code (OCP Microscaling formats, 2023)."""
READABLE_BLOCKS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)
"""Types that the CPU's kernels read where they lie."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedRows:
    """[N, K] weights."""

    kind: Kind
    codes: torch.Tensor
    """uint8 [N, bytes of a row], any row stride: one byte per column, or two columns per byte, the first in the
    low bits."""
    scales: torch.Tensor
    """[ceil(N / rows_per_scale), G] of one of SCALE_DTYPES; rows contiguous."""
    columns: int
    group: int
    """Columns that share a scale; at least K: one per row."""
    rows_per_scale: int = 1
    zeros: torch.Tensor | None = None
    """uint8 [N, G], or None: `zero` everywhere."""
    zero: int = 0
    factor: torch.Tensor | None = None
    """One float32 that e4m3 scales are multiplied by, or divided by where `divides`; rounded to float32 then."""
    divides: bool = False

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.uint8
        assert self.codes.shape[1] * 8 >= self.columns * BITS[self.kind], "a row is too short for its columns"
        assert self.scales.dtype in SCALE_DTYPES
        assert tuple(self.scales.shape) == (-(-self.codes.shape[0] // self.rows_per_scale), self.num_groups)
        assert self.factor is None or self.scales.dtype == torch.float8_e4m3fn
        assert self.zeros is None or (self.zeros.shape, self.zeros.dtype) == (
            (self.codes.shape[0], self.num_groups),
            torch.uint8,
        )

    @property
    def num_groups(self) -> int:
        return -(-self.columns // self.group)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.columns

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is stored."""
        return (self.codes, self.scales) if self.zeros is None else (self.codes, self.scales, self.zeros)

    def rows(self, which: slice | torch.Tensor) -> QuantizedRows:
        """Some of the rows, e.g. every other one, or in another order. Only where each row has its own scales."""
        assert self.rows_per_scale == 1
        zeros = None if self.zeros is None else self.zeros[which]
        return replace(self, codes=self.codes[which], scales=self.scales[which], zeros=zeros)

    def scale_values(self) -> torch.Tensor:
        """`scales` as float32, with the factor."""
        return self.with_factor(scale_values(self.scales))

    def with_factor(self, scales: torch.Tensor) -> torch.Tensor:
        """float32 scales of any shape with the matrix's factor."""
        if self.factor is None:
            return scales
        factor = self.factor.reshape(())
        return scales / factor if self.divides else scales * factor

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N, K] in `dtype`, computed in float32 or, where `dtype` is wider, in that."""
        wide = torch.promote_types(dtype, torch.float32)
        codes = decode(self.kind, self.codes, self.columns).to(wide)
        group_of = torch.arange(self.columns, device=self.codes.device) // self.group
        zeros = self.zero if self.zeros is None else self.zeros[:, group_of].to(wide)
        scales = self.scale_values().to(wide).repeat_interleave(self.rows_per_scale, 0)[: codes.shape[0]]
        return ((codes - zeros) * scales[:, group_of]).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class BlockRows:
    """[N, K] weights."""

    type: str
    """ggml's name of the blocks, such as Q4_K."""
    blocks: torch.Tensor
    """uint8 [N, bytes of a row]; rows contiguous, any row stride."""
    columns: int

    def __post_init__(self) -> None:
        assert self.blocks.dtype == torch.uint8
        assert self.blocks.shape[1] == row_bytes(self.type, self.columns), "rows are no whole number of blocks"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.blocks.shape[0], self.columns

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is stored."""
        return (self.blocks,)

    def rows(self, which: slice | torch.Tensor) -> BlockRows:
        """Some of the rows, e.g. every other one, or in another order."""
        return BlockRows(self.type, self.blocks[which], self.columns)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N, K] in `dtype`: ggml's float32 values, rounded where `dtype` is narrower."""
        values = dequantize(self.blocks.cpu().contiguous().numpy(), GGMLQuantizationType[self.type])
        return torch.from_numpy(values).to(device=self.blocks.device, dtype=dtype)


def row_bytes(block_type: str, columns: int) -> int:
    """Bytes of a row of `columns` weights. ValueError: they are no whole number of blocks."""
    block_columns, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[block_type]]
    if columns % block_columns:
        raise ValueError(f"{columns} columns are no whole number of {block_type} blocks of {block_columns}")
    return columns // block_columns * block_bytes


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """float32 of any of SCALE_DTYPES."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.to(torch.float32) - 127)
    return scales.to(torch.float32)


def decode(kind: Kind, codes: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 [N, bytes of a row] -> float32 [N, K]: the codes as numbers."""
    if BITS[kind] == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
    codes = codes[:, :columns]
    if kind == "fp4":
        return torch.tensor(FP4_VALUES, device=codes.device)[codes.long()]
    if kind == "fp8":
        return codes.contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    if kind == "int8":
        return codes.contiguous().view(torch.int8).to(torch.float32)
    return codes.to(torch.float32)
