"""Attention of prompts on a GPU: the tokens of any number of prompts in one launch, over keys and values in pages.

    out[t, h] = softmax over what t sees of (scale * query[t, h] . keys) @ values

A token sees its own context up to itself, or the last `window` tokens of it. A program takes as many tokens of one
prompt as fill BLOCK_M rows with the G query heads of one key/value head, so that a key is read once for all of them
(FlashAttention over pages, as in vLLM). Nothing is gathered, no key is repeated, and there is no mask in memory.

Per program, in torch terms, for each BLOCK_N tokens: s = q @ k.T; m, l, acc = softmax state updated with s and v. A
sink is where the state begins: the largest score so far, with a sum of 1 and no value.

Keys may come in two parts: the second one, `rest`, is the same for all heads (the rotary values of latent attention).

Shape alphabet: T tokens, Hk key/value heads, G query heads per key/value head, D head dim, R of the rest, S = P * B
tokens in P pages of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moe_serve_kernels.gpu import is_interpreted
from moe_serve_kernels.gpu.dot import dot
from moe_serve_kernels.gpu.fallback import run_first_that_fits

LOG2_E = 1.4426950408889634
MIN_SIDE = 16
ROWS = 128
ROWS_FLOAT32 = 16
"""Of a program: tokens times query heads."""


class Prompt(NamedTuple):
    """Some consecutive tokens of one sequence."""

    first_row: int
    """Of its tokens among the step's."""
    start: int
    """Position of the first of these."""
    end: int
    """One past the position of the last."""
    first_page: int
    """Where its pages begin in the list of all."""


class Prompts(NamedTuple):
    """The prompts of a step, cut into what programs take."""

    tiles: torch.Tensor
    """[tiles, 4] int32: first page, first row, tokens, position of the first."""
    pages: torch.Tensor
    """[pages of all prompts] int64."""


class Rest(NamedTuple):
    """The part of queries and keys in which all heads have the same key."""

    query: torch.Tensor
    """[T, Hk*G, R]."""
    keys: torch.Tensor
    """[S, R]."""


class _Tile(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int


def tiles_of(prompts: Sequence[Prompt], groups: int, dtype: torch.dtype) -> list[tuple[int, int, int, int]]:
    """Rows of `Prompts.tiles`. `groups`: G; `dtype`: of queries, keys and values."""
    step = _tokens(groups, dtype)
    return [
        (prompt.first_page, prompt.first_row + done, min(step, prompt.end - prompt.start - done), prompt.start + done)
        for prompt in prompts
        for done in range(0, prompt.end - prompt.start, step)
    ]


def attend_to_prompts(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prompts: Prompts,
    out: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    rest: Rest | None = None,
) -> None:
    """Fills the prompts' rows of `out` [T, Hk*G, Dv], and no other.

    query [T, Hk*G, D]; keys [Hk, S, D], values [Hk, S, Dv]; sinks [Hk*G]; `prompts` cut for G. All on one GPU, of one
    float type, with a contiguous last dimension; they may be parts of anything.
    """
    parts = (query, keys, values, out, *(rest or ()))
    assert all(part.stride(-1) == 1 for part in parts)
    if not len(prompts.tiles):
        return

    def launch(tile: _Tile) -> None:
        _launch(query, keys, values, prompts, out, page_size, scale, window, sinks, rest, tile)

    run_first_that_fits([_tile(query.dtype), _Tile(MIN_SIDE, 4, 1)], launch)


def _launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prompts: Prompts,
    out: torch.Tensor,
    page_size: int,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
    rest: Rest | None,
    tile: _Tile,
) -> None:
    kv_heads, groups = keys.shape[0], query.shape[1] // keys.shape[0]
    query_rest, key_rest = (query, keys[0]) if rest is None else rest
    attend_prompts[(len(prompts.tiles), kv_heads)](
        query,
        query_rest,
        keys,
        key_rest,
        values,
        query if sinks is None else sinks,
        prompts.tiles,
        prompts.pages,
        out,
        scale * LOG2_E,
        window or 0,
        *query.stride()[:2],
        *query_rest.stride()[:2],
        *keys.stride()[:2],
        key_rest.stride(0),
        *values.stride()[:2],
        *out.stride()[:2],
        GROUPS=groups,
        DIM=query.shape[2],
        REST=0 if rest is None else rest.keys.shape[1],
        VALUE_DIM=values.shape[2],
        PAGE_SIZE=page_size,
        HAS_SINKS=sinks is not None,
        BLOCK_M=_block(_tokens(groups, query.dtype) * groups),
        BLOCK_N=tile.block_n,
        BLOCK_D=_block(query.shape[2]),
        BLOCK_R=MIN_SIDE if rest is None else _block(rest.keys.shape[1]),
        BLOCK_V=_block(values.shape[2]),
        UPCAST=is_interpreted(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )


def _tokens(groups: int, dtype: torch.dtype) -> int:
    """Of a program."""
    return max(1, (ROWS_FLOAT32 if dtype == torch.float32 else ROWS) // groups)


def _tile(dtype: torch.dtype) -> _Tile:
    if dtype == torch.float32:
        return _Tile(MIN_SIDE, 4, 1)
    return _Tile(32, 8, 2)


def _block(size: int) -> int:
    return max(MIN_SIDE, int(triton.next_power_of_2(size)))


@triton.jit
def attend_prompts(
    query_ptr,
    query_rest_ptr,
    keys_ptr,
    key_rest_ptr,
    values_ptr,
    sinks_ptr,
    tiles_ptr,
    pages_ptr,
    out_ptr,
    scale,
    window,
    query_row,
    query_head,
    query_rest_row,
    query_rest_head,
    key_head,
    key_row,
    key_rest_row,
    value_head,
    value_row,
    out_row,
    out_head,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles, Hk). A prompt's last tiles have the most to read, so they go first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    first_page = tl.load(tiles_ptr + tile * 4)
    first_row = tl.load(tiles_ptr + tile * 4 + 1).to(tl.int64)
    count = tl.load(tiles_ptr + tile * 4 + 2)
    position = tl.load(tiles_ptr + tile * 4 + 3)
    m = tl.arange(0, BLOCK_M)
    token = m // GROUPS
    head = kv_head * GROUPS + m % GROUPS
    is_row = token < count
    row = first_row + token
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    is_query = is_row[:, None] & (d < DIM)[None, :]
    q = tl.load(query_ptr + (row * query_row + head * query_head)[:, None] + d[None, :], mask=is_query, other=0.0)
    if REST > 0:
        r = tl.arange(0, BLOCK_R)
        at_rest = (row * query_rest_row + head * query_rest_head)[:, None] + r[None, :]
        q_rest = tl.load(query_rest_ptr + at_rest, mask=is_row[:, None] & (r < REST)[None, :], other=0.0)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        largest = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    last_seen = position + token
    begin = 0
    if window > 0:
        begin = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
    keys_ptr += kv_head * key_head
    values_ptr += kv_head * value_head
    for start in tl.range(begin, position + count, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        is_key = at < position + count
        page = tl.load(pages_ptr + first_page + at // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
        slot = page * PAGE_SIZE + at % PAGE_SIZE
        k = tl.load(
            keys_ptr + (slot * key_row)[:, None] + d[None, :], mask=is_key[:, None] & (d < DIM)[None, :], other=0.0
        )
        scores = dot(q, tl.trans(k), UPCAST)
        if REST > 0:
            k_rest = tl.load(
                key_rest_ptr + (slot * key_rest_row)[:, None] + r[None, :],
                mask=is_key[:, None] & (r < REST)[None, :],
                other=0.0,
            )
            scores += dot(q_rest, tl.trans(k_rest), UPCAST)
        is_seen = at[None, :] <= last_seen[:, None]
        if window > 0:
            is_seen = is_seen & (at[None, :] > last_seen[:, None] - window)
        scores = tl.where(is_seen, scores * scale, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A row may have seen nothing yet, and inf - inf is no number.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(p, 1)
        w = tl.load(
            values_ptr + (slot * value_row)[:, None] + v[None, :],
            mask=is_key[:, None] & (v < VALUE_DIM)[None, :],
            other=0.0,
        )
        acc = acc * shrink[:, None] + dot(p.to(w.dtype), w, UPCAST)
        largest = new_largest
    total = tl.where(is_row, total, 1.0)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    at_out = (row * out_row + head * out_head)[:, None] + v[None, :]
    tl.store(out_ptr + at_out, out, mask=is_row[:, None] & (v < VALUE_DIM)[None, :])
