"""Paged attention for decoding on a GPU: one query token per sequence, keys and values read in place.

    out[n, h*G + g] = softmax(scale * query[n, h*G + g] . keys[h, context of n]) @ values[h, context of n]

The meaning, window and sinks included, is that of `moe_serve_kernels.cpu.paged_attention`, whose reference holds for
both. A program takes one sequence, one key/value head with its G query heads, and SPLIT_TOKENS of the context; a second
kernel joins the splits (Flash-Decoding). Splits lie at fixed positions, so a sequence's bits depend on its own context
alone; their number follows from the page table's width, so that a graph can be captured for a width.

Per program, in torch terms, for each BLOCK_N tokens: s = q @ k.T; m, l, acc = softmax state updated with s and v.

Shape alphabet: N sequences, Hk key/value heads, G query heads per key/value head, D head dim, P pages, B page size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_serve_kernels.gpu import is_available as _gpu_is_available
from moe_serve_kernels.gpu import is_interpreted

SPLIT_TOKENS = 512
BLOCK_N = 64
MIN_ROWS = 16
"""Fewest rows of a matrix product: G query heads are padded to it."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = 1.4426950408889634


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when `paged_decode` can run on such tensors here."""
    return dtype in DTYPES and _gpu_is_available(device)


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
) -> torch.Tensor:
    """Attention of one query token per sequence -> [N, Hk*G, Dv] of the query's dtype.

    query [N, Hk*G, D]; keys [Hk, P*B, D]; values [Hk, P*B, Dv]; page_table [N, max pages] int64; lengths [N] int64,
    each >= 1; sinks [Hk*G]. All on one GPU, and contiguous but for the rows of page_table, which may be the beginnings
    of longer ones; query, keys and values of one dtype of DTYPES.
    """
    assert all(t.is_contiguous() for t in (query, keys, values, lengths))
    assert page_table.stride(1) == 1
    assert query.dtype == keys.dtype == values.dtype
    num_seqs, heads, key_dim = query.shape
    kv_heads, num_slots, value_dim = values.shape
    splits = max(1, triton.cdiv(page_table.shape[1] * page_size, SPLIT_TOKENS))
    partial = torch.empty(num_seqs, heads, splits, value_dim, dtype=torch.float32, device=query.device)
    state = torch.empty(2, num_seqs, heads, splits, dtype=torch.float32, device=query.device)
    out = query.new_empty(num_seqs, heads, value_dim)
    if num_seqs == 0:
        return out
    groups = heads // kv_heads
    wide = max(key_dim, value_dim) > 128
    attend_split[(num_seqs, kv_heads, splits)](
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
        BLOCK_M=max(MIN_ROWS, triton.next_power_of_2(groups)),
        BLOCK_N=BLOCK_N,
        BLOCK_D=max(16, triton.next_power_of_2(key_dim)),
        BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        UPCAST=is_interpreted(),
        num_warps=4,
        num_stages=2 if wide or query.dtype == torch.float32 else 3,
        enable_fp_fusion=True,
    )
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
        BLOCK_V=triton.next_power_of_2(value_dim),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return out


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (N, Hk, splits). Largest score (base 2), sum and unnormalised output of one split; none for an empty one."""
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    end = tl.load(lengths_ptr + n).to(tl.int32)
    begin = 0
    if window > 0:
        begin = tl.maximum(end - window, 0)
    first = tl.maximum(split * SPLIT_TOKENS, begin // BLOCK_N * BLOCK_N)
    last = tl.minimum(split * SPLIT_TOKENS + SPLIT_TOKENS, end)
    if first >= last:
        return
    g = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    row = n * tl.num_programs(1) * GROUPS + head * GROUPS + g
    is_head = g < GROUPS
    is_key = (d < KEY_DIM)[None, :]
    is_value = (v < VALUE_DIM)[None, :]
    q = tl.load(query_ptr + row[:, None] * KEY_DIM + d[None, :], mask=is_head[:, None] & is_key, other=0.0)
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
        k = tl.load(keys_ptr + slot[:, None] * KEY_DIM + d[None, :], mask=is_seen[:, None] & is_key, other=0.0)
        scores = _dot(q, tl.trans(k), UPCAST) * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A block may lie wholly before the window: nothing has been seen yet, and inf - inf is no number.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(p, 1)
        w = tl.load(values_ptr + slot[:, None] * VALUE_DIM + v[None, :], mask=is_seen[:, None] & is_value, other=0.0)
        acc = acc * shrink[:, None] + _dot(p.to(w.dtype), w, UPCAST)
        largest = new_largest
    at_state = row * tl.num_programs(2) + split
    tl.store(max_ptr + at_state, largest, mask=is_head)
    tl.store(sum_ptr + at_state, total, mask=is_head)
    tl.store(partial_ptr + at_state[:, None] * VALUE_DIM + v[None, :], acc, mask=is_head[:, None] & is_value)


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


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
    for split in range(begin // SPLIT_TOKENS, tl.cdiv(end, SPLIT_TOKENS)):
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
