"""Paged attention for decoding on a GPU: one query token per sequence, keys and values read in place.

    out[n, h*G + g] = softmax(scale * query[n, h*G + g] . keys[h, context of n]) @ values[h, context of n]

The meaning, window and sinks included, is that of `moe_serve_kernels.cpu.paged_attention`, whose reference holds for
both. A program takes one sequence, one key/value head with its G query heads, and a split of the context; a second
kernel joins the splits (Flash-Decoding). Splits lie at fixed positions, so a sequence's bits depend on its own context
alone; their number follows from the page table's width, so that a graph can be captured for a width.

Per program, in torch terms, for each BLOCK_N tokens: s = q @ k.T; m, l, acc = softmax state updated with s and v.

A latent cache (multi-head latent attention with absorbed projections, DeepSeek-V2; attended to in place as in FlashMLA
and vLLM) has one key/value head of rows [latents, rotary values] that all query heads share; the latents are the values
too. There a program takes 16 of the query heads and reads a row once: s = q_first @ k_first.T + q_rest @ k_rest.T, with
v = k_first.

Shape alphabet: N sequences, Hk key/value heads, G query heads per key/value head, D head dim, P pages, B page size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moe_serve_kernels.gpu import is_available as _gpu_is_available
from moe_serve_kernels.gpu import is_interpreted
from moe_serve_kernels.gpu.dot import dot
from moe_serve_kernels.gpu.fallback import run_first_that_fits

SPLIT_TOKENS = 512
"""Of the first splits."""
SPLITS_OF_A_SIZE = 16
"""Then they double: 131,072 tokens are 65 splits, where 256 partial results would take 0.5 GiB for 128 sequences."""
MIN_SIDE = 16
"""Of a matrix product: fewer query heads are padded to it."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = 1.4426950408889634


class _Tile(NamedTuple):
    """How a program takes its split: query heads at a time, tokens at a time, and Triton's software pipeline."""

    block_m: int
    block_n: int
    num_stages: int


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when `paged_decode` can run on such tensors here."""
    return dtype in DTYPES and _gpu_is_available(device)


def splits_of(num_tokens: int) -> int:
    """Splits that a context of so many tokens needs: at least one."""
    count, end, size = 0, 0, SPLIT_TOKENS
    while end < num_tokens or count == 0:
        end += size
        count += 1
        size <<= count % SPLITS_OF_A_SIZE == 0
    return count


def paged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query token per sequence -> [N, Hk*G, Dv] of the query's dtype, in `out` if it is given.

    query [N, Hk*G, D]; keys [Hk, P*B, D]; values [Hk, P*B, Dv]; page_table [N, max pages] int64; lengths [N] int64,
    each >= 1; sinks [Hk*G]. All on one GPU, and contiguous but for the rows of page_table, which may be the beginnings
    of longer ones, and of values, which may be the beginnings of the keys' rows: a latent cache, keys[:, :, :Dv].
    query, keys and values of one dtype of DTYPES.
    """
    latent = _begin_the_rows(values, keys)
    assert all(t.is_contiguous() for t in (query, keys, lengths))
    assert latent or values.is_contiguous()
    assert page_table.stride(1) == 1
    assert query.dtype == keys.dtype == values.dtype
    num_seqs, heads, _ = query.shape
    value_dim = values.shape[2]
    splits = splits_of(page_table.shape[1] * page_size)
    partial = torch.empty(num_seqs, heads, splits, value_dim, dtype=torch.float32, device=query.device)
    state = torch.empty(2, num_seqs, heads, splits, dtype=torch.float32, device=query.device)
    out = query.new_empty(num_seqs, heads, value_dim) if out is None else out
    assert out.is_contiguous()
    if num_seqs:
        _attend(query, keys, values, page_table, lengths, partial, state, page_size, scale, window, latent)
        _join(partial, state, lengths, window, sinks, out)
    return out


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    partial: torch.Tensor,
    state: torch.Tensor,
    page_size: int,
    scale: float,
    window: int | None,
    latent: bool,
) -> None:
    """Every split by itself: `partial` [N, heads, splits, Dv], and its largest score and sum in `state`."""
    num_seqs, heads, splits, value_dim = partial.shape
    kv_heads, num_slots, _ = values.shape
    groups, key_dim = heads // kv_heads, query.shape[2]

    def launch(tile: _Tile) -> None:
        attend_split[(kv_heads * triton.cdiv(groups, tile.block_m), num_seqs, splits)](
            query,
            keys,
            values,
            page_table,
            lengths,
            partial,
            state,
            state[1],
            scale * LOG2_E,
            num_slots,
            page_table.stride(0),
            window or 0,
            GROUPS=groups,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            PAGE_SIZE=page_size,
            SPLIT_TOKENS=SPLIT_TOKENS,
            SPLITS_OF_A_SIZE=SPLITS_OF_A_SIZE,
            BLOCK_D=_block(value_dim if latent else key_dim),
            BLOCK_V=_block(value_dim),
            BLOCK_REST=_block(key_dim - value_dim) if latent else 0,
            UPCAST=is_interpreted(),
            **_options(tile),
        )

    chosen = _latent_tile(query.dtype) if latent else _tile(groups, max(key_dim, value_dim), query.dtype)
    run_first_that_fits([chosen, chosen._replace(block_n=MIN_SIDE, num_stages=1)], launch)


def _options(tile: _Tile) -> dict[str, int | bool]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": 4,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def _join(
    partial: torch.Tensor,
    state: torch.Tensor,
    lengths: torch.Tensor,
    window: int | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The splits of each sequence and head as one: `out` [N, heads, Dv]."""
    num_seqs, heads, splits, value_dim = partial.shape
    join_splits[(num_seqs, heads)](
        partial,
        state,
        state[1],
        state if sinks is None else sinks,
        lengths,
        out,
        splits,
        window or 0,
        HAS_SINKS=sinks is not None,
        VALUE_DIM=value_dim,
        SPLIT_TOKENS=SPLIT_TOKENS,
        SPLITS_OF_A_SIZE=SPLITS_OF_A_SIZE,
        BLOCK_V=triton.next_power_of_2(value_dim),
        num_warps=1,
        enable_fp_fusion=True,
    )


def _begin_the_rows(values: torch.Tensor, keys: torch.Tensor) -> bool:
    """Values are a view of the beginnings of the keys' rows."""
    is_view = values.data_ptr() == keys.data_ptr() and values.stride() == keys.stride()
    return is_view and values.shape[2] < keys.shape[2]


def _tile(groups: int, widest: int, dtype: torch.dtype) -> _Tile:
    """Heads beyond 128 numbers take half the tokens at a time: 64 spill on sm_120."""
    few_stages = widest > 128 or dtype == torch.float32
    return _Tile(_block(groups), 32 if widest > 128 else 64, 2 if few_stages else 3)


def _latent_tile(dtype: torch.dtype) -> _Tile:
    """No spills with DeepSeek's rows of 512 + 64. Of five stages two are blocks of rows, the others look up pages."""
    return _Tile(16, 16, 2 if dtype == torch.float32 else 5)


def _block(size: int) -> int:
    return max(MIN_SIDE, int(triton.next_power_of_2(size)))


@triton.jit
def _split(split, SPLIT_TOKENS: tl.constexpr, SPLITS_OF_A_SIZE: tl.constexpr):
    """Where a split begins, and its tokens."""
    doubled = split // SPLITS_OF_A_SIZE
    tokens = SPLIT_TOKENS << doubled
    begin = SPLITS_OF_A_SIZE * (tokens - SPLIT_TOKENS) + split % SPLITS_OF_A_SIZE * tokens
    return begin, tokens


@triton.jit
def attend_split(
    query_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    lengths_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    scale,
    num_slots,
    table_stride,
    window,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SPLITS_OF_A_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (Hk * chunks of BLOCK_M query heads, N, splits): chunks that read the same rows run at the same time.

    Largest score (base 2), sum and unnormalised output of one split; none for an empty one. BLOCK_REST: of a latent
    cache's rows, what is not a value; else 0.
    """
    LATENT: tl.constexpr = BLOCK_REST > 0
    FIRST_DIM: tl.constexpr = VALUE_DIM if LATENT else KEY_DIM
    CHUNKS: tl.constexpr = (GROUPS + BLOCK_M - 1) // BLOCK_M
    n = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(0) // CHUNKS).to(tl.int64)
    split = tl.program_id(2)
    end = tl.load(lengths_ptr + n).to(tl.int32)
    begin = 0
    if window > 0:
        begin = tl.maximum(end - window, 0)
    split_begin, split_tokens = _split(split, SPLIT_TOKENS, SPLITS_OF_A_SIZE)
    first = tl.maximum(split_begin, begin // BLOCK_N * BLOCK_N)
    last = tl.minimum(split_begin + split_tokens, end)
    if first >= last:
        return
    g = tl.program_id(0) % CHUNKS * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    row = (n * (tl.num_programs(0) // CHUNKS) + head) * GROUPS + g
    is_head = g < GROUPS
    q = _load(query_ptr, row, is_head, d, FIRST_DIM, KEY_DIM)
    if LATENT:
        r = VALUE_DIM + tl.arange(0, BLOCK_REST)
        q_rest = _load(query_ptr, row, is_head, r, KEY_DIM, KEY_DIM)
    keys_ptr += head * num_slots * KEY_DIM
    values_ptr += head * num_slots * VALUE_DIM
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in tl.range(first, last, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        is_seen = (at >= begin) & (at < last)
        page = tl.load(table_ptr + n * table_stride + at // PAGE_SIZE, mask=at < last, other=0)
        slot = page * PAGE_SIZE + at % PAGE_SIZE
        k = _load(keys_ptr, slot, is_seen, d, FIRST_DIM, KEY_DIM)
        scores = dot(q, tl.trans(k), UPCAST)
        if LATENT:
            k_rest = _load(keys_ptr, slot, is_seen, r, KEY_DIM, KEY_DIM)
            scores += dot(q_rest, tl.trans(k_rest), UPCAST)
        scores *= scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A block may lie wholly before the window: nothing has been seen yet, and inf - inf is no number.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(p, 1)
        w = k if LATENT else _load(values_ptr, slot, is_seen, v, VALUE_DIM, VALUE_DIM)
        acc = acc * shrink[:, None] + dot(p.to(w.dtype), w, UPCAST)
        largest = new_largest
    at_state = row * tl.num_programs(2) + split
    tl.store(max_ptr + at_state, largest, mask=is_head)
    tl.store(sum_ptr + at_state, total, mask=is_head)
    is_out = is_head[:, None] & (v < VALUE_DIM)[None, :]
    tl.store(partial_ptr + at_state[:, None] * VALUE_DIM + v[None, :], acc, mask=is_out)


@triton.jit
def _load(ptr, row, is_row, column, END: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of rows of WIDTH numbers; 0 from column END on and where not is_row."""
    mask = is_row[:, None] & (column < END)[None, :]
    return tl.load(ptr + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)


@triton.jit
def join_splits(
    partial_ptr,
    max_ptr,
    sum_ptr,
    sinks_ptr,
    lengths_ptr,
    out_ptr,
    num_splits,
    window,
    HAS_SINKS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SPLITS_OF_A_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (N, heads). Splits in ascending order; those without a visible token were never written."""
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    v = tl.arange(0, BLOCK_V)
    end = tl.load(lengths_ptr + n).to(tl.int32)
    begin = 0
    if window > 0:
        begin = tl.maximum(end - window, 0)
    largest = float("-inf")
    total = 0.0
    if HAS_SINKS:
        largest = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        total = 1.0
    acc = tl.zeros([BLOCK_V], tl.float32)
    row = (n * tl.num_programs(1) + head) * num_splits
    for split in range(0, num_splits):
        split_begin, split_tokens = _split(split, SPLIT_TOKENS, SPLITS_OF_A_SIZE)
        if (split_begin < end) & (split_begin + split_tokens > begin):
            own = tl.load(max_ptr + row + split)
            new_largest = tl.maximum(largest, own)
            shrink = tl.exp2(largest - new_largest)
            grow = tl.exp2(own - new_largest)
            part = tl.load(partial_ptr + (row + split) * VALUE_DIM + v, mask=v < VALUE_DIM, other=0.0)
            acc = acc * shrink + part * grow
            total = total * shrink + tl.load(sum_ptr + row + split) * grow
            largest = new_largest
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (n * tl.num_programs(1) + head) * VALUE_DIM + v, out, mask=v < VALUE_DIM)
