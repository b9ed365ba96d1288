"""Sorting a step's (token, choice) pairs by expert, and cutting each expert's pairs into tiles.

    pairs       = the P pairs in ascending order of expert, within an expert in ascending order
    ends[e]     = number of pairs of experts 0..e
    tile m      = rows tile_start[m] .. min(tile_start[m] + block_t, ends[tile_expert[m]]) of `pairs`

Example, block_t = 2, ids = [[2, 0], [0, 1], [2, 1], [2, 3]]: pairs = [1, 2, 3, 5, 0, 4, 6, 7], ends = [2, 4, 7, 8],
tiles (expert, start) = (0, 0), (1, 2), (2, 4), (2, 6), (3, 7), then surplus ones with expert -1.

A negative id marks padding (a row that only fills up a batch): its pair is in no tile and in none of `pairs`.
Nothing is padded: a tile knows its end. The number of tiles is the most that any routing can need, so the grid does
not depend on data (moe_align_block_size of vLLM pads instead). Up to ONE_BLOCK_PAIRS pairs a single program compares
every pair with every other; beyond that, blocks count, one program adds up, and blocks place their pairs.

Shape alphabet: T tokens, K choices, P = T * K pairs, E experts, M tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ONE_BLOCK_PAIRS = 512
BLOCK_PAIRS = 512
"""Pairs that one program places when there are more."""
CHUNK = 32
NUM_WARPS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """All int32, on the device of the ids."""

    pairs: torch.Tensor
    """[P] pair t * K + k of each sorted row; beyond the last choice, nothing."""
    ends: torch.Tensor
    """[E]"""
    tile_expert: torch.Tensor
    """[M]; -1: nothing to do."""
    tile_start: torch.Tensor
    """[M] first sorted row."""

    @property
    def num_tiles(self) -> int:
        return self.tile_expert.shape[0]


def max_tiles(num_pairs: int, num_experts: int, block_t: int) -> int:
    """The most tiles that any routing of `num_pairs` pairs makes."""
    return num_pairs // block_t + min(num_experts, num_pairs)


def align(ids: torch.Tensor, num_experts: int, block_t: int) -> Aligned:
    """ids [T, K] of any integer type, contiguous, each below E; block_t: rows per tile."""
    assert ids.is_contiguous()
    num_pairs = ids.numel()
    aligned = empty_aligned(ids, num_experts, max_tiles(num_pairs, num_experts, block_t))
    if num_pairs == 0:
        aligned.ends.zero_()
        return aligned
    block_e = max(CHUNK, triton.next_power_of_2(num_experts))
    if num_pairs <= ONE_BLOCK_PAIRS:
        _in_one_block(ids, aligned, num_experts, block_t, block_e)
    else:
        _in_many_blocks(ids, aligned, num_experts, block_t, block_e)
    return aligned


def align_segments(
    tokens: torch.Tensor, segments: Sequence[tuple[int, int]], slots: Sequence[int], block_t: int
) -> tuple[Aligned, torch.Tensor]:
    """The same for pairs that the host has sorted, in one copy to the device -> the tiles, and slot_of [n].

    tokens [P] the token of each sorted pair, which take the place of the pairs; segments[i]: the rows of expert i of n,
    which is in slots[i].
    """
    tiles = [(i, row) for i, (start, end) in enumerate(segments) for row in range(start, end, block_t)]
    columns = [end for _, end in segments], slots, [i for i, _ in tiles], [row for _, row in tiles]
    sizes = [len(column) for column in columns]
    table = torch.tensor([value for column in columns for value in column], dtype=torch.int32)
    if tokens.is_cuda:
        table = table.pin_memory()
    ends, slot_of, tile_expert, tile_start = table.to(tokens.device, non_blocking=True).split(sizes)
    return Aligned(tokens.to(torch.int32), ends, tile_expert, tile_start), slot_of


def empty_aligned(ids: torch.Tensor, num_experts: int, num_tiles: int) -> Aligned:
    sizes = (ids.numel(), num_experts, num_tiles, num_tiles)
    return Aligned(*(torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes))


def _in_one_block(ids: torch.Tensor, aligned: Aligned, num_experts: int, block_t: int, block_e: int) -> None:
    align_one_block[(1,)](
        ids,
        aligned.pairs,
        aligned.ends,
        aligned.tile_expert,
        aligned.tile_start,
        ids.numel(),
        num_experts,
        aligned.num_tiles,
        BLOCK_T=block_t,
        BLOCK_P=max(CHUNK, triton.next_power_of_2(ids.numel())),
        BLOCK_E=block_e,
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


def _in_many_blocks(ids: torch.Tensor, aligned: Aligned, num_experts: int, block_t: int, block_e: int) -> None:
    num_blocks = triton.cdiv(ids.numel(), BLOCK_PAIRS)
    counts = torch.empty(num_blocks, block_e, dtype=torch.int32, device=ids.device)
    sizes = {"BLOCK_P": BLOCK_PAIRS, "BLOCK_E": block_e, "CHUNK": CHUNK}
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    align_count[(num_blocks,)](ids, counts, ids.numel(), **sizes, **options)
    align_add_up[(1,)](
        counts,
        aligned.ends,
        aligned.tile_expert,
        aligned.tile_start,
        num_blocks,
        num_experts,
        aligned.num_tiles,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        CHUNK=CHUNK,
        **options,
    )
    # Half as many at a time: with all of them it spills.
    align_place[(num_blocks,)](ids, counts, aligned.pairs, ids.numel(), **sizes | {"CHUNK": CHUNK // 2}, **options)


@triton.jit
def _load_ids(ids_ptr, at, num_pairs, BLOCK_E: tl.constexpr):
    """Beyond the end: BLOCK_E, larger than any expert."""
    return tl.load(ids_ptr + at, mask=at < num_pairs, other=BLOCK_E).to(tl.int32)


@triton.jit
def _padding_last(ids, BLOCK_E: tl.constexpr):
    """Ids with padding (negative) replaced by BLOCK_E, which sorts last."""
    return tl.where(ids < 0, BLOCK_E, ids)


@triton.jit
def _write_tiles(
    counts,
    ends,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """counts, ends [BLOCK_E] -> the tile table."""
    expert = tl.arange(0, BLOCK_E)
    tiles = (counts + BLOCK_T - 1) // BLOCK_T
    tile_ends = tl.cumsum(tiles, 0)
    for first in range(0, num_tiles, CHUNK):
        m = first + tl.arange(0, CHUNK)
        own = tl.sum((tile_ends[None, :] <= m[:, None]).to(tl.int32), axis=1)
        is_own = expert[None, :] == own[:, None]
        starts = ends[None, :] - counts[None, :] + (m[:, None] - tile_ends[None, :] + tiles[None, :]) * BLOCK_T
        start = tl.sum(tl.where(is_own, starts, 0), axis=1)
        tl.store(tile_expert_ptr + m, tl.where(own < BLOCK_E, own, -1), mask=m < num_tiles)
        tl.store(tile_start_ptr + m, start, mask=m < num_tiles)


@triton.jit
def align_one_block(
    ids_ptr,
    pairs_ptr,
    ends_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_pairs,
    num_experts,
    num_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A pair's row is the number of pairs that come before it."""
    p = tl.arange(0, BLOCK_P)
    expert = tl.arange(0, BLOCK_E)
    own = _padding_last(_load_ids(ids_ptr, p, num_pairs, BLOCK_E), BLOCK_E)
    row = tl.zeros([BLOCK_P], tl.int32)
    ends = tl.zeros([BLOCK_E], tl.int32)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, BLOCK_P, CHUNK):
        q = first + tl.arange(0, CHUNK)
        other = _padding_last(_load_ids(ids_ptr, q, num_pairs, BLOCK_E), BLOCK_E)
        before = (other[None, :] < own[:, None]) | ((other[None, :] == own[:, None]) & (q[None, :] < p[:, None]))
        row += tl.sum(before.to(tl.int32), axis=1)
        ends += tl.sum((other[None, :] <= expert[:, None]).to(tl.int32), axis=1)
        counts += tl.sum((other[None, :] == expert[:, None]).to(tl.int32), axis=1)
    tl.store(pairs_ptr + row, p, mask=own < BLOCK_E)
    tl.store(ends_ptr + expert, ends, mask=expert < num_experts)
    _write_tiles(counts, ends, tile_expert_ptr, tile_start_ptr, num_tiles, BLOCK_T, BLOCK_E, CHUNK)


@triton.jit
def align_count(ids_ptr, counts_ptr, num_pairs, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr):
    """counts[b, e] = pairs of expert e in block b."""
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, BLOCK_P, CHUNK):
        own = _load_ids(ids_ptr, block * BLOCK_P + first + tl.arange(0, CHUNK), num_pairs, BLOCK_E)
        counts += tl.sum((own[None, :] == expert[:, None]).to(tl.int32), axis=1)
    tl.store(counts_ptr + block * BLOCK_E + expert, counts)


@triton.jit
def align_add_up(
    counts_ptr,
    ends_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_blocks,
    num_experts,
    num_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """counts[b, e] becomes the row of the first pair of expert e in block b."""
    expert = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        at = counts_ptr + block[:, None] * BLOCK_E + expert[None, :]
        total += tl.sum(tl.load(at, mask=(block < num_blocks)[:, None], other=0), axis=0)
    ends = tl.cumsum(total, 0)
    row = ends - total
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        at = counts_ptr + block[:, None] * BLOCK_E + expert[None, :]
        counts = tl.load(at, mask=(block < num_blocks)[:, None], other=0)
        tl.store(at, row[None, :] + tl.cumsum(counts, 0) - counts, mask=(block < num_blocks)[:, None])
        row += tl.sum(counts, axis=0)
    tl.store(ends_ptr + expert, ends, mask=expert < num_experts)
    _write_tiles(total, ends, tile_expert_ptr, tile_start_ptr, num_tiles, BLOCK_T, BLOCK_E, CHUNK)


@triton.jit
def align_place(
    ids_ptr, first_rows_ptr, pairs_ptr, num_pairs, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr
):
    """A pair's row is its expert's first in this block plus the equals before it."""
    block = tl.program_id(0)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    own = _load_ids(ids_ptr, p, num_pairs, BLOCK_E)
    is_choice = (own >= 0) & (own < BLOCK_E)
    row = tl.load(first_rows_ptr + block * BLOCK_E + own, mask=is_choice, other=0)
    for first in range(0, BLOCK_P, CHUNK):
        q = block * BLOCK_P + first + tl.arange(0, CHUNK)
        other = _load_ids(ids_ptr, q, num_pairs, BLOCK_E)
        row += tl.sum(((other[None, :] == own[:, None]) & (q[None, :] < p[:, None])).to(tl.int32), axis=1)
    tl.store(pairs_ptr + row, p, mask=is_choice)
