"""bf16 experts that come over the link in 12 bits a weight, and become bf16 in their slots, every bit as it was.

An expert's three matrices lie in one record in pinned host memory, all records of one size. What the last plan wants is
copied to a stage on the device as it is, in as long reads as any other part. A second launch decodes the stage into the
slots. Nothing waits for the host, so both can be captured.

A record has, for gate, up and down: codes, the table of exponents, and the list of rare weights, in the layout of
`moe_serve_kernels.cpu.coded.CodedRows`, which is the reference. A row has a fixed place and no bit depends on the one
before it. Rare weights have index 15 in the codes; the list holds them whole.

Shape alphabet: N rows (outputs), K columns (inputs), R entries of a list of rare weights, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_serve_kernels.gpu.pool import ExpertPool
from moe_serve_kernels.gpu.residency import Copies, GpuResidency, copy_experts

GROUP = tl.constexpr(128)
"""Columns that are coded together."""
GROUP_BYTES = tl.constexpr(192)
RARE = tl.constexpr(15)
ALIGN_BYTES = 16
NUM_EXPONENTS = 16
DECODE_PROGRAMS = 256
"""Rows that are decoded at a time, of each matrix: two or more for each multiprocessor."""
BLOCK = 512
"""Columns that a program decodes at a time."""
RARE_AT_ONCE = 32
FIELDS = tl.constexpr(7)
"""Of a matrix in the table that the kernel reads: three places in the record, address, slot bytes, N and K."""


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """What lies where in every record."""

    shapes: tuple[tuple[int, int], ...]
    """(N, K) of gate, up and down."""
    most_rare: tuple[int, ...]
    """The longest list of each, where rows begin included."""

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Of each matrix: where its codes, exponents and rare list begin."""
        at = 0
        for sizes in self._sizes():
            starts = []
            for size in sizes:
                starts.append(at)
                at += -(-size // ALIGN_BYTES) * ALIGN_BYTES
            yield starts[0], starts[1], starts[2]

    @property
    def num_bytes(self) -> int:
        return sum(-(-size // ALIGN_BYTES) * ALIGN_BYTES for sizes in self._sizes() for size in sizes)

    def _sizes(self) -> Iterator[tuple[int, int, int]]:
        for (rows, columns), entries in zip(self.shapes, self.most_rare, strict=True):
            yield rows * row_bytes(columns), NUM_EXPONENTS, 4 * entries


def row_bytes(columns: int) -> int:
    """Of a row's codes."""
    return int(-(-columns // GROUP.value) * GROUP_BYTES.value)


class CodedLink:
    """Records in pinned host memory, and the way from there into the slots of a plain bf16 pool."""

    def __init__(
        self, records: Sequence[torch.Tensor], layout: RecordLayout, pool: ExpertPool, most_at_once: int
    ) -> None:
        """`records`: uint8, by layer * E + expert. `most_at_once`: copies of one plan."""
        data = pool.down.data
        assert pool.format == "plain"
        assert data.dtype == torch.bfloat16
        device = data.device
        self._records = records  # keeps alive what `sources` points to
        self._stage = torch.empty(most_at_once, layout.num_bytes, dtype=torch.uint8, device=device)
        self._table = torch.tensor(list(_table(layout, pool)), dtype=torch.int64, device=device)
        addresses = [[record.data_ptr() for record in records]]
        tables = (addresses, [self._stage.data_ptr()], [layout.num_bytes])
        self._copies = Copies(*(torch.tensor(table, dtype=torch.int64, device=device) for table in tables))

    def bring(self, state: GpuResidency) -> None:
        """Fill the slots that the last plan gave away."""
        copy_experts(state, self._copies, to_stage=True)
        decode(self._stage, self._table, state)


def decode(stage: torch.Tensor, table: torch.Tensor, state: GpuResidency) -> None:
    """stage [copies, bytes of a record]; table [3, FIELDS] int64."""
    decode_kernel[(DECODE_PROGRAMS, table.shape[0])](
        stage,
        table,
        state.wanted,
        state.counts,
        stage.shape[1],
        state.num_experts,
        BLOCK=BLOCK,
        RARE_AT_ONCE=RARE_AT_ONCE,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _table(layout: RecordLayout, pool: ExpertPool) -> Iterator[tuple[int, ...]]:
    both, down = pool.gate_up.data, pool.down.data
    targets = (both[:, 0], both[:, 1], down)
    for places, target, shape in zip(layout.places(), targets, layout.shapes, strict=True):
        assert tuple(target.shape[1:]) == shape
        yield *places, target.data_ptr(), target.stride(0) * target.itemsize, *shape


@triton.jit
def decode_kernel(
    stage_ptr,
    table_ptr,
    wanted_ptr,
    counts_ptr,
    record_bytes,
    num_experts,
    BLOCK: tl.constexpr,
    RARE_AT_ONCE: tl.constexpr,
):
    """Grid (programs, 3): program i takes every `programs`-th row, from row i on, of one matrix of every expert."""
    table_ptr += tl.program_id(1) * FIELDS
    num_rows = tl.load(table_ptr + 5)
    columns = tl.load(table_ptr + 6)
    bytes_of_row = tl.cdiv(columns, GROUP) * GROUP_BYTES
    for i in range(0, tl.load(counts_ptr)):
        record = stage_ptr + (tl.zeros([], tl.int64) + i) * record_bytes
        slot = tl.load(wanted_ptr + num_experts + i).to(tl.int64)
        out = (tl.load(table_ptr + 3) + slot * tl.load(table_ptr + 4)).to(tl.pointer_type(tl.int16))
        exponents = record + tl.load(table_ptr + 1)
        rare = (record + tl.load(table_ptr + 2)).to(tl.pointer_type(tl.int32))
        for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
            codes = record + tl.load(table_ptr) + row * bytes_of_row
            _decode_row(codes, exponents, out + row * columns, columns, BLOCK)
            _place_rare(rare, row, out + row * columns, RARE_AT_ONCE)


@triton.jit
def _decode_row(codes, exponents, out, columns, BLOCK: tl.constexpr):
    """All weights but the rare ones. Of a group's four quarters, q and q + 1 share 64 bytes, and all share 32 words."""
    for first in range(0, columns, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = c < columns
        quarter = c % GROUP // 32
        pair = codes + c // GROUP * GROUP_BYTES + 2 * (c % 32) + quarter // 2 * 64 + quarter % 2
        rest = tl.load(pair, mask=inside, other=0).to(tl.int32)
        word = codes + c // GROUP * GROUP_BYTES + GROUP + 2 * (c % 32) + quarter // 2
        index = (tl.load(word, mask=inside, other=0).to(tl.int32) >> quarter % 2 * 4) & 15
        exponent = tl.load(exponents + index).to(tl.int32)
        bits = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
        tl.store(out + c, bits.to(tl.int16), mask=inside & (index != RARE))


@triton.jit
def _place_rare(rare, row, out, RARE_AT_ONCE: tl.constexpr):
    """A row's entries: column in the upper half, weight in the lower."""
    end = tl.load(rare + row + 1)
    for first in range(tl.load(rare + row), end, RARE_AT_ONCE):
        at = first + tl.arange(0, RARE_AT_ONCE)
        entry = tl.load(rare + at, mask=at < end, other=0)
        tl.store(out + ((entry >> 16) & 0xFFFF), (entry & 0xFFFF).to(tl.int16), mask=at < end)
