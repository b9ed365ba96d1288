"""From a layer's products to what attention reads, in one launch: norms of heads, rotation, and the writes to pages.

Plain attention: queries and keys are normalised (where the model has such norms) and rotated, and keys and values go to
their pages. Modules take 20 to 30 launches for this. Latent attention: a token's latents are normalised and go to its
page with the rotated values that all heads share; each query's last values are rotated.

Which values of a head are rotated against each other is a family's own: `Rotary` in moe_serve_kernels.cpu.decoder.
One program per token and head; it reads each rotated value's partner once more, which the L1 cache has.

Shape alphabet: T tokens, Hq query and Hk key/value heads of D (values of Dv), R rotary values, P pages of B tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Turns(NamedTuple):
    """How tokens are rotated."""

    cos: torch.Tensor
    """[positions, R / 2] float32."""
    sin: torch.Tensor
    positions: torch.Tensor
    """[T] int64."""
    kind: str
    """halves, neighbours or neighbours_to_halves."""


class HeadNorms(NamedTuple):
    """RMSNorm of each head [D], or of all heads at once [Hq * D]; None where the model has none."""

    query: torch.Tensor | None
    key: torch.Tensor | None
    eps: float


def rotate_heads(
    qkv: torch.Tensor,
    turns: Turns,
    norms: HeadNorms,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Queries [T, Hq, D], normalised and rotated; keys and values at `slots` [T] of their pages.

    qkv [T, Hq * D + Hk * D + Hk * Dv] contiguous; keys [Hk, P*B, D] and values [Hk, P*B, Dv] contiguous.
    """
    assert qkv.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    kv_heads, num_slots, dim = keys.shape
    num_tokens, value_dim = qkv.shape[0], values.shape[2]
    heads = (qkv.shape[1] - kv_heads * (dim + value_dim)) // dim
    query = qkv.new_empty(num_tokens, heads, dim)
    widths = [0 if norm is None else norm.numel() for norm in (norms.query, norms.key)]
    if num_tokens:
        rotate_heads_kernel[(num_tokens, heads + 2 * kv_heads)](
            qkv,
            qkv if norms.query is None else norms.query,
            qkv if norms.key is None else norms.key,
            turns.cos,
            turns.sin,
            turns.positions,
            slots,
            query,
            keys,
            values,
            num_slots,
            norms.eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            VALUE_DIM=value_dim,
            ROTARY=2 * turns.cos.shape[1],
            KIND=turns.kind,
            QUERY_NORM=widths[0],
            KEY_NORM=widths[1],
            BLOCK_NORM=triton.next_power_of_2(max(1, *widths)),
            BLOCK_D=triton.next_power_of_2(max(dim, value_dim)),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return query


def rotate_latents(
    query: torch.Tensor,
    latents: torch.Tensor,
    turns: Turns,
    norm: torch.Tensor,
    eps: float,
    slots: torch.Tensor,
    rows: torch.Tensor,
    rotated: torch.Tensor,
) -> None:
    """Each query's last R values, rotated, to `rotated` [T, Hq, R]; a token's latents and rotated values to its row.

    query [T, Hq, D], latents [T, rank + R] and `rotated` may be parts of longer rows; norm [rank]; rows
    [1, P*B, rank + R] contiguous, of which `slots` [T] are written.
    """
    assert rows.is_contiguous()
    assert query.stride(2) == latents.stride(1) == rotated.stride(2) == 1
    num_tokens, heads, dim = query.shape
    rank, turned = norm.numel(), rotated.shape[2]
    if num_tokens:
        rotate_latents_kernel[(num_tokens, heads + 1)](
            query,
            latents,
            norm,
            turns.cos,
            turns.sin,
            turns.positions,
            slots,
            rows,
            rotated,
            query.stride(0),
            query.stride(1),
            latents.stride(0),
            rotated.stride(0),
            rotated.stride(1),
            eps,
            HEADS=heads,
            PLAIN=dim - turned,
            RANK=rank,
            ROTARY=turned,
            KIND=turns.kind,
            BLOCK_RANK=triton.next_power_of_2(rank),
            BLOCK_R=triton.next_power_of_2(turned),
            num_warps=1,
            enable_fp_fusion=True,
        )


@triton.jit
def _rotated(
    ptr, norm_ptr, shrink, cos_ptr, sin_ptr, d, inside, HAS_NORM: tl.constexpr, ROTARY: tl.constexpr, KIND: tl.constexpr
):
    """Values d < ROTARY of a head at `ptr`, each with its partner: float32."""
    half: tl.constexpr = ROTARY // 2
    if KIND == "halves":
        pair = d % half
        real, imaginary = pair, pair + half
        is_imaginary = d >= half
    elif KIND == "neighbours":
        pair = d // 2
        real, imaginary = 2 * pair, 2 * pair + 1
        is_imaginary = d % 2 == 1
    else:
        tl.static_assert(KIND == "neighbours_to_halves")
        pair = d % half
        real, imaginary = 2 * pair, 2 * pair + 1
        is_imaginary = d >= half
    a = tl.load(ptr + real, mask=inside, other=0.0).to(tl.float32) * shrink
    b = tl.load(ptr + imaginary, mask=inside, other=0.0).to(tl.float32) * shrink
    if HAS_NORM:
        a *= tl.load(norm_ptr + real, mask=inside, other=0.0).to(tl.float32)
        b *= tl.load(norm_ptr + imaginary, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + pair, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + pair, mask=inside, other=0.0)
    return tl.where(is_imaginary, b * cos + a * sin, a * cos - b * sin)


@triton.jit
def _shrink(ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """1 / RMS of WIDTH values."""
    w = tl.arange(0, BLOCK)
    x = tl.load(ptr + w, mask=w < WIDTH, other=0.0).to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)


@triton.jit
def _head(
    ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    head,
    eps,
    d,
    NORM: tl.constexpr,
    BLOCK_NORM: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    KIND: tl.constexpr,
):
    """One head of the heads at `ptr`, normalised and rotated: float32. NORM: values that share a norm; 0: none."""
    shrink = 1.0
    if NORM > 0:
        first = ptr if NORM > DIM else ptr + head * DIM
        shrink = _shrink(first, eps, NORM, BLOCK_NORM)
        norm_ptr += head * DIM if NORM > DIM else 0
    ptr += head * DIM
    x = tl.load(ptr + d, mask=d < DIM, other=0.0).to(tl.float32) * shrink
    if NORM > 0:
        x *= tl.load(norm_ptr + d, mask=d < DIM, other=0.0).to(tl.float32)
    turned = _rotated(ptr, norm_ptr, shrink, cos_ptr, sin_ptr, d, d < ROTARY, NORM > 0, ROTARY, KIND)
    return tl.where(d < ROTARY, turned, x)


@triton.jit
def rotate_heads_kernel(
    qkv_ptr,
    query_norm_ptr,
    key_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    num_slots,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    KIND: tl.constexpr,
    QUERY_NORM: tl.constexpr,
    KEY_NORM: tl.constexpr,
    BLOCK_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (T, Hq + 2 * Hk): the queries' heads, the keys', the values'."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    qkv_ptr += token * (HEADS * DIM + KV_HEADS * (DIM + VALUE_DIM))
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token)
    cos_ptr += position * (ROTARY // 2)
    sin_ptr += position * (ROTARY // 2)
    if head < HEADS:
        x = _head(qkv_ptr, query_norm_ptr, cos_ptr, sin_ptr, head, eps, d, QUERY_NORM, BLOCK_NORM, DIM, ROTARY, KIND)
        at = (token * HEADS + head) * DIM + d
        tl.store(query_ptr + at, x.to(query_ptr.dtype.element_ty), mask=d < DIM)
    elif head < HEADS + KV_HEADS:
        own = head - HEADS
        x = _head(
            qkv_ptr + HEADS * DIM, key_norm_ptr, cos_ptr, sin_ptr, own, eps, d, KEY_NORM, BLOCK_NORM, DIM, ROTARY, KIND
        )
        at = (own.to(tl.int64) * num_slots + slot) * DIM + d
        tl.store(keys_ptr + at, x.to(keys_ptr.dtype.element_ty), mask=d < DIM)
    else:
        own = head - HEADS - KV_HEADS
        x = tl.load(qkv_ptr + (HEADS + KV_HEADS) * DIM + own * VALUE_DIM + d, mask=d < VALUE_DIM, other=0.0).to(
            tl.float32
        )
        at = (own.to(tl.int64) * num_slots + slot) * VALUE_DIM + d
        tl.store(values_ptr + at, x.to(values_ptr.dtype.element_ty), mask=d < VALUE_DIM)


@triton.jit
def rotate_latents_kernel(
    query_ptr,
    latents_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    rows_ptr,
    rotated_ptr,
    query_stride,
    head_stride,
    latents_stride,
    rotated_stride,
    rotated_head_stride,
    eps,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (T, Hq + 1): the queries' heads, then the token's own row."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions_ptr + token)
    cos_ptr += position * (ROTARY // 2)
    sin_ptr += position * (ROTARY // 2)
    r = tl.arange(0, BLOCK_R)
    if head < HEADS:
        query_ptr += token * query_stride + head * head_stride + PLAIN
        x = _rotated(query_ptr, query_ptr, 1.0, cos_ptr, sin_ptr, r, r < ROTARY, False, ROTARY, KIND)
        at = token * rotated_stride + head * rotated_head_stride + r
        tl.store(rotated_ptr + at, x.to(rotated_ptr.dtype.element_ty), mask=r < ROTARY)
    else:
        latents_ptr += token * latents_stride
        rows_ptr += tl.load(slots_ptr + token) * (RANK + ROTARY)
        c = tl.arange(0, BLOCK_RANK)
        x = tl.load(latents_ptr + c, mask=c < RANK, other=0.0).to(tl.float32)
        x *= _shrink(latents_ptr, eps, RANK, BLOCK_RANK) * tl.load(norm_ptr + c, mask=c < RANK, other=0.0).to(
            tl.float32
        )
        tl.store(rows_ptr + c, x.to(rows_ptr.dtype.element_ty), mask=c < RANK)
        x = _rotated(latents_ptr + RANK, latents_ptr, 1.0, cos_ptr, sin_ptr, r, r < ROTARY, False, ROTARY, KIND)
        tl.store(rows_ptr + RANK + r, x.to(rows_ptr.dtype.element_ty), mask=r < ROTARY)
