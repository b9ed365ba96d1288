"""The two matrix products of a MoE layer for pairs grouped by expert.

    gate_up:  act[r]       = activation(gate x[token of r] + gate_bias, up x[token of r] + up_bias)   r: sorted row
    down:     out[pair r]  = down act[r] + down_bias

Each program computes one tile of tokens times one tile of outputs of one expert; gate and up side by side, so that the
activation needs no memory. Programs of one weight tile run next to each other, so that a weight is read from memory
once. The summation order depends on the tile shape alone: not on the slot, the other experts or the neighbours.
A tile whose expert is in no slot is left out: its rows of `act` and `out` keep what they held.

Per program, in torch terms, w [2, F, C] and x [N, C] tiles:
    for each C inputs:  gate += w[0] @ x.T;  up += w[1] @ x.T        (SWAP; else x @ w.T)

Shape alphabet: T tokens, K choices, P = T * K pairs, E experts, H hidden, I intermediate; tiles: N tokens, F outputs,
C inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu import is_interpreted
from moe_serve_kernels.gpu.activate import activate
from moe_serve_kernels.gpu.align import Aligned
from moe_serve_kernels.gpu.configs import Gemv, Tile
from moe_serve_kernels.gpu.operands import (
    load_input_halves,
    load_inputs,
    load_rows,
    multiply,
    multiply_packed,
    second_half,
    zeros,
)
from moe_serve_kernels.gpu.pool import Bank


def bank_arguments(bank: Bank) -> dict[str, Any]:
    """What a kernel gets to know of a bank; absent tensors are stood in for by one that is never read."""
    form = bank.form
    data = bank.data.view(torch.uint8) if bank.data.dtype == torch.float8_e4m3fn else bank.data
    of_output = bank.scale if form.scale_of == "output" else bank.factor
    return {
        "w_ptr": data,
        "scale_ptr": data if bank.scale is None else bank.scale,
        "zero_ptr": data if bank.zero is None else bank.zero,
        "factor_ptr": data if of_output is None else of_output,
        "bias_ptr": data if bank.bias is None else bank.bias,
        "slot_stride": data.stride(0),
        "scale_stride": 0 if bank.scale is None else bank.scale.stride(0),
        "HAS_FACTOR": of_output is not None,
        "HAS_BIAS": bank.bias is not None,
        "FORMAT": bank.format,
        "GROUP": bank.group_size,
        "ROWS": form.rows_per_scale if form.scale_of == "group" else 0,
        "HALF": form.half(bank.group_size) if form.is_packed else 0,
    }


def loop_arguments(loop: Tile | Gemv, bank: Bank) -> dict[str, Any]:
    """The shape of a program's loop as the kernels' constants. A step reads one scale of an output at most; packed
    formats step by their groups."""
    block_c = min(loop.block_c, bank.group_size) if bank.form.scale_of == "group" else loop.block_c
    return {
        "BLOCK_F": loop.block_f,
        "BLOCK_C": block_c,
        "EVEN": bank.num_inputs % block_c == 0,
        "num_warps": loop.num_warps,
        "num_stages": loop.num_stages,
        "enable_fp_fusion": True,
    }


def _arguments(bank: Bank, tile: Tile) -> dict[str, Any]:
    constants = {"BLOCK_T": tile.block_t, "SWAP": tile.swap, "UPCAST": is_interpreted()}
    return {**bank_arguments(bank), **loop_arguments(tile, bank), **constants}


def gate_up(
    x: torch.Tensor,
    bank: Bank,
    slot_of: torch.Tensor,
    aligned: Aligned,
    top_k: int,
    activation: Activation,
    tile: Tile,
) -> torch.Tensor:
    """x [T, H] contiguous; slot_of [E] int32 -> [P, I] of x's dtype, rows in sorted order."""
    assert x.is_contiguous()
    inner = bank.num_outputs // 2
    act = torch.empty(aligned.pairs.shape[0], inner, dtype=x.dtype, device=x.device)
    if aligned.num_tiles:
        gate_up_kernel[(aligned.num_tiles, triton.cdiv(inner, tile.block_f))](
            x,
            act,
            slot_of,
            aligned.pairs,
            aligned.ends,
            aligned.tile_expert,
            aligned.tile_start,
            hidden=x.shape[1],
            inner=inner,
            top_k=top_k,
            alpha=activation.alpha,
            limit=activation.limit,
            KIND=activation.kind,
            **_arguments(bank, tile),
        )
    return act


def down(act: torch.Tensor, bank: Bank, slot_of: torch.Tensor, aligned: Aligned, out: torch.Tensor, tile: Tile) -> None:
    """act [P, I] in sorted order -> rows of `out` [P, H], any float dtype, in the order of pairs."""
    assert act.is_contiguous()
    assert out.is_contiguous()
    if aligned.num_tiles:
        down_kernel[(aligned.num_tiles, triton.cdiv(out.shape[1], tile.block_f))](
            act,
            out,
            slot_of,
            aligned.pairs,
            aligned.ends,
            aligned.tile_expert,
            aligned.tile_start,
            hidden=out.shape[1],
            inner=act.shape[1],
            **_arguments(bank, tile),
        )


@triton.jit
def gate_up_kernel(
    x_ptr,
    act_ptr,
    slot_of_ptr,
    pairs_ptr,
    ends_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    bias_ptr,
    slot_stride,
    scale_stride,
    hidden,
    inner,
    top_k,
    alpha,
    limit,
    KIND: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles, cdiv(I, BLOCK_F))."""
    slot, rows, row_ok = _rows_of_tile(slot_of_ptr, ends_ptr, tile_expert_ptr, tile_start_ptr, BLOCK_T)
    if slot < 0:
        return
    tokens = tl.load(pairs_ptr + rows, mask=row_ok, other=0) // top_k
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    f_ok = f < inner
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * hidden
    weights = w_ptr + slot * slot_stride, scale_ptr + slot * scale_stride, zero_ptr + slot * scale_stride
    factor_ptr += slot * 2 * inner
    bias_ptr += slot * 2 * inner
    gate = zeros(BLOCK_F, BLOCK_T, SWAP)
    up = zeros(BLOCK_F, BLOCK_T, SWAP)
    if HALF:
        for step in tl.range(0, hidden // (2 * HALF)):
            x_low, x_high = load_input_halves(x_rows, step, row_ok, HALF)
            gate = multiply_packed(
                gate, x_low, x_high, weights, f, f_ok, step, 2 * inner, dtype, FORMAT, HALF, SWAP, UPCAST
            )
            up = multiply_packed(
                up, x_low, x_high, weights, inner + f, f_ok, step, 2 * inner, dtype, FORMAT, HALF, SWAP, UPCAST
            )
    else:
        ups = second_half(weights, inner, hidden, GROUP, ROWS)
        for first in tl.range(0, hidden, BLOCK_C):
            x = load_inputs(x_rows, first + tl.arange(0, BLOCK_C), row_ok, hidden, EVEN)
            w = load_rows(weights, f, first, inner, hidden, dtype, FORMAT, BLOCK_C, GROUP, ROWS, EVEN)
            gate = multiply(w, x, gate, SWAP, UPCAST)
            w = load_rows(ups, f, first, inner, hidden, dtype, FORMAT, BLOCK_C, GROUP, ROWS, EVEN)
            up = multiply(w, x, up, SWAP, UPCAST)
    gate = _finish(gate, factor_ptr, bias_ptr, f, f_ok, HAS_FACTOR, HAS_BIAS, SWAP)
    up = _finish(up, factor_ptr, bias_ptr, inner + f, f_ok, HAS_FACTOR, HAS_BIAS, SWAP)
    act = activate(gate, up, alpha, limit, KIND).to(act_ptr.dtype.element_ty)
    _store(act_ptr, act, rows, row_ok, f, f_ok, inner, SWAP)


@triton.jit
def down_kernel(
    act_ptr,
    out_ptr,
    slot_of_ptr,
    pairs_ptr,
    ends_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    bias_ptr,
    slot_stride,
    scale_stride,
    hidden,
    inner,
    HAS_FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles, cdiv(H, BLOCK_F))."""
    slot, rows, row_ok = _rows_of_tile(slot_of_ptr, ends_ptr, tile_expert_ptr, tile_start_ptr, BLOCK_T)
    if slot < 0:
        return
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    f_ok = f < hidden
    dtype: tl.constexpr = tl.float32 if UPCAST else act_ptr.dtype.element_ty
    x_rows = act_ptr + rows.to(tl.int64)[:, None] * inner
    weights = w_ptr + slot * slot_stride, scale_ptr + slot * scale_stride, zero_ptr + slot * scale_stride
    acc = zeros(BLOCK_F, BLOCK_T, SWAP)
    if HALF:
        for step in tl.range(0, inner // (2 * HALF)):
            x_low, x_high = load_input_halves(x_rows, step, row_ok, HALF)
            acc = multiply_packed(acc, x_low, x_high, weights, f, f_ok, step, hidden, dtype, FORMAT, HALF, SWAP, UPCAST)
    else:
        for first in tl.range(0, inner, BLOCK_C):
            x = load_inputs(x_rows, first + tl.arange(0, BLOCK_C), row_ok, inner, EVEN)
            w = load_rows(weights, f, first, hidden, inner, dtype, FORMAT, BLOCK_C, GROUP, ROWS, EVEN)
            acc = multiply(w, x, acc, SWAP, UPCAST)
    acc = _finish(acc, factor_ptr + slot * hidden, bias_ptr + slot * hidden, f, f_ok, HAS_FACTOR, HAS_BIAS, SWAP)
    pairs = tl.load(pairs_ptr + rows, mask=row_ok, other=0)
    _store(out_ptr, acc.to(out_ptr.dtype.element_ty), pairs, row_ok, f, f_ok, hidden, SWAP)


@triton.jit
def _rows_of_tile(slot_of_ptr, ends_ptr, tile_expert_ptr, tile_start_ptr, BLOCK_T: tl.constexpr):
    """This program's slot (-1: nothing to do), its sorted rows [N], and which of them are the expert's."""
    expert = tl.load(tile_expert_ptr + tl.program_id(0))
    slot = tl.load(slot_of_ptr + expert, mask=expert >= 0, other=-1).to(tl.int64)
    rows = tl.load(tile_start_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_T)
    return slot, rows, rows < tl.load(ends_ptr + expert, mask=expert >= 0, other=0)


@triton.jit
def _finish(acc, factor_ptr, bias_ptr, f, f_ok, HAS_FACTOR: tl.constexpr, HAS_BIAS: tl.constexpr, SWAP: tl.constexpr):
    """Factor per output, then bias; both pointers are those of the slot."""
    axis: tl.constexpr = 1 if SWAP else 0
    if HAS_FACTOR:
        acc *= tl.expand_dims(tl.load(factor_ptr + f, mask=f_ok, other=0.0), axis)
    if HAS_BIAS:
        acc += tl.expand_dims(tl.load(bias_ptr + f, mask=f_ok, other=0.0), axis)
    return acc


@triton.jit
def _store(out_ptr, values, rows, row_ok, f, f_ok, stride, SWAP: tl.constexpr):
    rows = rows.to(tl.int64)
    if SWAP:
        tl.store(out_ptr + rows[None, :] * stride + f[:, None], values, mask=row_ok[None, :] & f_ok[:, None])
    else:
        tl.store(out_ptr + rows[:, None] * stride + f[None, :], values, mask=row_ok[:, None] & f_ok[None, :])
