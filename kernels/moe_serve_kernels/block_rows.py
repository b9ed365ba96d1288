"""BlockRows: a weight matrix in ggml's blocks, row by row: what a GGUF file stores, as a view of it.

A block holds the codes of 32 or 256 columns and their scales side by side. What the codes stand for is ggml's
definition, for which the `gguf` package is the reference.

Shape alphabet: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

READABLE = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)
"""Types that the CPU's kernels read where they lie."""


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

    def rows(self, which: slice) -> BlockRows:
        """Some of the rows, e.g. every other one."""
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
