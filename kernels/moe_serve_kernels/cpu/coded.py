"""CodedRows: a bf16 matrix in 12 bits a weight, without loss.

A weight's sign and mantissa stay a byte. Its exponent becomes a four-bit index into the matrix's 15 most frequent
exponents; index 15 says that the weight is rare, and a list holds it whole. Trained matrices have about 2e-4 rare
weights.

    codes      uint8 [N, groups * 192]: GROUP columns are GROUP_BYTES bytes. Byte 64 h + 2 l + i of a group (h and i
               are 0 or 1) is the sign and the mantissa of column 64 h + 32 i + l. The 32 words behind these 128 bytes
               hold the indices: bits 4 q to 4 q + 3 of word l are those of column 32 q + l.
    exponents  uint8 [16], the last 0
    rare       int32 [N + 1 + R]: where each row's entries begin and where the last row's end, counted from the start of
               `rare`; then the entries, in the order of rows and columns: column in the upper half, weight in the lower

So a row has a fixed place, and 128 columns of it are decoded by one table look-up and a few bit operations: no bit
depends on the one before it. Columns behind the last are zeros. Knows no file.

Shape alphabet: N rows (outputs), K columns (inputs), R rare weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

GROUP = 128
"""Columns that are coded together."""
GROUP_BYTES = GROUP * 3 // 2
QUARTER = GROUP // 4
NUM_INDICES = 16
RARE = NUM_INDICES - 1
"""The index that stands for no exponent."""
MOST_COLUMNS = 1 << 16
WORDS = np.dtype("<u2")
Words = npt.NDArray[np.uint16]
Octets = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class CodedRows:
    """[N, K] bf16 weights."""

    codes: torch.Tensor
    """Rows contiguous, any row stride."""
    exponents: torch.Tensor
    rare: torch.Tensor
    columns: int

    def __post_init__(self) -> None:
        assert self.codes.dtype == self.exponents.dtype == torch.uint8
        assert self.rare.dtype == torch.int32
        assert self.codes.shape[1] == row_bytes(self.columns)
        assert self.exponents.shape == (NUM_INDICES,)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.columns

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is stored."""
        return self.codes, self.exponents, self.rare

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def damage(self) -> str | None:
        """What no encoder writes, in words; None where nothing is wrong. The codes themselves are always readable."""
        starts, entries = self.rare[: len(self.codes) + 1].numpy(), self.rare[len(self.codes) + 1 :].numpy()
        if len(starts) <= len(self.codes) or starts[0] != len(starts) or starts[-1] != len(self.rare):
            return f"the list of rare weights has {len(self.rare)} entries and names others"
        if (np.diff(starts) < 0).any():
            return "the rows' rare weights are out of order"
        if (entries.view(np.uint32) >> 16 >= self.columns).any():
            return f"a rare weight lies behind the last of {self.columns} columns"
        if self.exponents[RARE] != 0:
            return "the table of exponents has no end"
        return None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N, K] in `dtype`. Exact in bf16 and float32."""
        return self.decoded().to(device=self.codes.device, dtype=dtype)

    def decoded(self) -> torch.Tensor:
        """bf16 [N, K], every bit as it was, on the CPU."""
        codes, exponents, rare = (tensor.cpu().contiguous().numpy() for tensor in self.tensors)
        num_rows = len(codes)
        groups = codes.reshape(num_rows, -1, GROUP_BYTES)
        table = exponents.astype(np.uint16) << 7
        weights = np.empty((num_rows, groups.shape[1], 4, QUARTER), np.uint16)
        rest = groups[:, :, :GROUP].reshape(num_rows, -1, 2, QUARTER, 2).swapaxes(3, 4)
        weights[:] = rest.reshape(weights.shape)
        weights[:] = (weights & 0x80) << 8 | weights & 0x7F
        indices = np.ascontiguousarray(groups[:, :, GROUP:]).view(WORDS)
        for quarter in range(4):
            weights[:, :, quarter] |= table[indices >> 4 * quarter & RARE]
        flat = weights.reshape(num_rows, -1)
        entries = rare[num_rows + 1 :].view(np.uint32)
        rows = np.repeat(np.arange(num_rows), np.diff(rare[: num_rows + 1]))
        flat[rows, entries >> 16] = entries & 0xFFFF
        return _to_bf16(flat[:, : self.columns])


def row_bytes(columns: int) -> int:
    """Of a row's codes."""
    return -(-columns // GROUP) * GROUP_BYTES


def encode(matrix: torch.Tensor) -> CodedRows | None:
    """bf16 [N, K] -> its codes, or None where the matrix takes no more memory as it is."""
    assert matrix.dtype == torch.bfloat16
    columns = matrix.shape[1]
    if columns > MOST_COLUMNS:
        return None
    weights = _words_of(matrix)
    exponents = (weights >> 7).astype(np.uint8)
    table = _most_frequent(exponents)
    index_of = np.full(256, RARE, np.uint8)
    index_of[table[:RARE]] = np.arange(RARE)
    indices = index_of[exponents]
    rare = _rare_list(weights, indices == RARE)
    codes = _codes(weights, indices)
    coded = CodedRows(torch.from_numpy(codes), torch.from_numpy(table), torch.from_numpy(rare), columns)
    return coded if coded.num_bytes < matrix.numel() * matrix.itemsize else None


def _most_frequent(exponents: Octets) -> Octets:
    """[16]: the 15 most frequent, the smaller first of two that are as frequent; then 0."""
    counts = np.bincount(exponents.ravel(), minlength=256)
    table = np.zeros(NUM_INDICES, np.uint8)
    table[:RARE] = np.argsort(-counts, kind="stable")[:RARE]
    return table


def _rare_list(weights: Words, is_rare: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    rows, columns = np.nonzero(is_rare)
    starts = np.zeros(len(weights) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(weights)), out=starts[1:])
    entries = columns.astype(np.uint32) << 16 | weights[rows, columns]
    return np.concatenate([(starts + len(starts)).astype(np.int32), entries.astype(np.uint32).view(np.int32)])


def _codes(weights: Words, indices: Octets) -> Octets:
    """uint8 [N, bytes of a row]."""
    num_rows = len(weights)
    rest = ((weights >> 8 & 0x80) | (weights & 0x7F)).astype(np.uint8)
    groups = np.empty((num_rows, row_bytes(weights.shape[1]) // GROUP_BYTES, GROUP_BYTES), np.uint8)
    halves = _in_groups(rest, 0).reshape(num_rows, -1, 2, 2, QUARTER).swapaxes(3, 4)
    groups[:, :, :GROUP] = halves.reshape(num_rows, -1, GROUP)
    quarters = _in_groups(indices, RARE).reshape(num_rows, -1, 4, QUARTER).astype(np.uint16)
    words = quarters[:, :, 0] | quarters[:, :, 1] << 4 | quarters[:, :, 2] << 8 | quarters[:, :, 3] << 12
    groups[:, :, GROUP:] = words.astype(WORDS).view(np.uint8)
    return groups.reshape(num_rows, -1)


def _in_groups(values: Octets, fill: int) -> Octets:
    """[N, K] with `fill` behind the last column, up to a whole group."""
    missing = -values.shape[1] % GROUP
    return np.pad(values, ((0, 0), (0, missing)), constant_values=fill) if missing else values


def _words_of(matrix: torch.Tensor) -> Words:
    words: Words = matrix.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return words


def _to_bf16(words: Words) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int16)).view(torch.bfloat16)
