"""A MoE layer's matrix products for a few tokens, every (token, choice) pair for itself: no sorting, no padding.

    gate_up:  act[p] = activation(gate x[p // K] + gate_bias, up x[p // K] + up_bias)            p: pair
    down:     out[t] = sum over k, in order, of weights[t, k] * (down act[t * K + k] + down_bias)

One launch each, and the second one adds up a token's choices itself, so that a decode step of a model with small
experts is two launches (one thread block per pair and output tile: vLLM's CUDA decode kernel). It is split into two
where one token has few output tiles. Programs of different
pairs and one output tile are neighbours: where two tokens share an expert, its weights come from the L2 cache.

Per program, in torch terms, w [F, C] tiles and one row x:  acc += (w * x).sum(1)

Triton pipelines loads that feed no matrix product only where the loop itself says so (`num_stages` of tl.range).

Shape alphabet: T tokens, K choices, P = T * K pairs, E experts, H hidden, I intermediate; tiles: F outputs, C inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu.activate import activate
from moe_serve_kernels.gpu.combine import combine
from moe_serve_kernels.gpu.configs import Gemv
from moe_serve_kernels.gpu.grouped import bank_arguments, loop_arguments
from moe_serve_kernels.gpu.operands import load_packed, load_rows, second_half, slot_of_choice
from moe_serve_kernels.gpu.pool import Bank

FEW_PROGRAMS = 256
"""Fewer leave most of a large GPU idle: an H100 has 132 multiprocessors, and each takes several programs."""


def gemv_gate_up(
    x: torch.Tensor, ids: torch.Tensor, bank: Bank, slot_of: torch.Tensor, activation: Activation, gemv: Gemv
) -> torch.Tensor:
    """x [T, H], ids [T, K] contiguous; slot_of [E] int32 -> [P, I] of x's dtype.

    Rows of pairs whose expert is in no slot, and of negative ids, are not written.
    """
    assert x.is_contiguous()
    assert ids.is_contiguous()
    inner = bank.num_outputs // 2
    act = torch.empty(ids.numel(), inner, dtype=x.dtype, device=x.device)
    if ids.numel():
        gemv_gate_up_kernel[(ids.numel(), triton.cdiv(inner, gemv.block_f))](
            x,
            act,
            slot_of,
            ids,
            hidden=x.shape[1],
            inner=inner,
            top_k=ids.shape[1],
            alpha=activation.alpha,
            limit=activation.limit,
            KIND=activation.kind,
            **bank_arguments(bank),
            **loop_arguments(gemv, bank),
            STAGES=gemv.num_stages,
        )
    return act


def gemv_down(
    act: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    bank: Bank,
    slot_of: torch.Tensor,
    out: torch.Tensor,
    gemv: Gemv,
) -> None:
    """act [P, I], weights [T, K] -> out [T, H], the sum over the choices whose expert is in a slot.

    Where that would leave most of a GPU idle, each pair is computed for itself, and `combine` adds them up: one launch
    more, and the same order of the sum.
    """
    assert weights.is_contiguous()
    if is_split(ids, out.shape[1], gemv):
        outputs = torch.empty(ids.numel(), out.shape[1], dtype=torch.float32, device=out.device)
        _sum_pairs(act, ids, None, bank, slot_of, outputs, gemv)
        combine(outputs, ids, weights, slot_of, out)
    else:
        _sum_pairs(act, ids, weights, bank, slot_of, out, gemv)


def is_split(ids: torch.Tensor, hidden: int, gemv: Gemv) -> bool:
    """Whether the second product of ids [T, K] takes each pair for itself."""
    return ids.shape[1] > 1 and ids.shape[0] * triton.cdiv(hidden, gemv.block_f) < FEW_PROGRAMS


def _sum_pairs(
    act: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    bank: Bank,
    slot_of: torch.Tensor,
    out: torch.Tensor,
    gemv: Gemv,
) -> None:
    """`out` [T, H], the weighted sums; without weights [P, H], each pair as it is, zeros where it is in no slot."""
    assert out.is_contiguous()
    if ids.numel():
        gemv_down_kernel[(out.shape[0], triton.cdiv(out.shape[1], gemv.block_f))](
            act,
            out,
            slot_of,
            ids,
            act if weights is None else weights,
            hidden=out.shape[1],
            inner=act.shape[1],
            PAIRS=ids.numel() // out.shape[0],
            WEIGHTED=weights is not None,
            **bank_arguments(bank),
            **loop_arguments(gemv, bank),
            STAGES=gemv.num_stages,
        )


@triton.jit
def gemv_gate_up_kernel(
    x_ptr,
    act_ptr,
    slot_of_ptr,
    ids_ptr,
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
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (P, cdiv(I, BLOCK_F))."""
    pair = tl.program_id(0)
    slot = slot_of_choice(ids_ptr, slot_of_ptr, pair)
    if slot < 0:
        return
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    f_ok = f < inner
    x_ptr += (pair // top_k) * hidden
    weights = w_ptr + slot * slot_stride, scale_ptr + slot * scale_stride, zero_ptr + slot * scale_stride
    if HALF:
        gate = _product_packed(x_ptr, weights, f, f_ok, 2 * inner, hidden, FORMAT, HALF, BLOCK_F, STAGES)
        up = _product_packed(x_ptr, weights, inner + f, f_ok, 2 * inner, hidden, FORMAT, HALF, BLOCK_F, STAGES)
    else:
        gates = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
        ups = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
        others = second_half(weights, inner, hidden, GROUP, ROWS)
        for first in tl.range(0, hidden, BLOCK_C, num_stages=STAGES):
            x = _load_x(x_ptr, first + tl.arange(0, BLOCK_C), hidden)
            gates += load_rows(weights, f, first, inner, hidden, tl.float32, FORMAT, BLOCK_C, GROUP, ROWS, EVEN) * x
            ups += load_rows(others, f, first, inner, hidden, tl.float32, FORMAT, BLOCK_C, GROUP, ROWS, EVEN) * x
        gate = tl.sum(gates, axis=1)
        up = tl.sum(ups, axis=1)
    if HAS_FACTOR:
        gate *= tl.load(factor_ptr + slot * 2 * inner + f, mask=f_ok, other=0.0)
        up *= tl.load(factor_ptr + (slot * 2 + 1) * inner + f, mask=f_ok, other=0.0)
    if HAS_BIAS:
        gate += tl.load(bias_ptr + slot * 2 * inner + f, mask=f_ok, other=0.0)
        up += tl.load(bias_ptr + (slot * 2 + 1) * inner + f, mask=f_ok, other=0.0)
    act = activate(gate, up, alpha, limit, KIND)
    tl.store(act_ptr + pair * inner + f, act.to(act_ptr.dtype.element_ty), mask=f_ok)


@triton.jit
def gemv_down_kernel(
    act_ptr,
    out_ptr,
    slot_of_ptr,
    ids_ptr,
    weights_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    bias_ptr,
    slot_stride,
    scale_stride,
    hidden,
    inner,
    PAIRS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (P / PAIRS, cdiv(H, BLOCK_F)). Each program adds up PAIRS pairs."""
    row = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    f_ok = f < hidden
    total = tl.zeros([BLOCK_F], tl.float32)
    for k in range(PAIRS):
        pair = row * PAIRS + k
        slot = slot_of_choice(ids_ptr, slot_of_ptr, pair)
        if slot >= 0:
            x_ptr = act_ptr + pair * inner
            weights = w_ptr + slot * slot_stride, scale_ptr + slot * scale_stride, zero_ptr + slot * scale_stride
            if HALF:
                one = _product_packed(x_ptr, weights, f, f_ok, hidden, inner, FORMAT, HALF, BLOCK_F, STAGES)
            else:
                sums = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
                for first in tl.range(0, inner, BLOCK_C, num_stages=STAGES):
                    x = _load_x(x_ptr, first + tl.arange(0, BLOCK_C), inner)
                    sums += (
                        load_rows(weights, f, first, hidden, inner, tl.float32, FORMAT, BLOCK_C, GROUP, ROWS, EVEN) * x
                    )
                one = tl.sum(sums, axis=1)
            if HAS_FACTOR:
                one *= tl.load(factor_ptr + slot * hidden + f, mask=f_ok, other=0.0)
            if HAS_BIAS:
                one += tl.load(bias_ptr + slot * hidden + f, mask=f_ok, other=0.0)
            if WEIGHTED:
                one *= tl.load(weights_ptr + pair).to(tl.float32)
            total += one
    tl.store(out_ptr + row * hidden + f, total.to(out_ptr.dtype.element_ty), mask=f_ok)


@triton.jit
def _load_x(x_ptr, c, num_inputs):
    """[1, C] of one row."""
    return tl.load(x_ptr + c, mask=c < num_inputs, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _product_packed(
    x_ptr,
    weights,
    f,
    f_ok,
    stride,
    num_inputs,
    FORMAT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row x times a packed matrix (data, scale, zero) -> [F]."""
    sums = tl.zeros([HALF, BLOCK_F], tl.float32)
    for step in tl.range(0, num_inputs // (2 * HALF), num_stages=STAGES):
        c = step * 2 * HALF + tl.arange(0, HALF)
        x_low = tl.load(x_ptr + c).to(tl.float32)[:, None]
        x_high = tl.load(x_ptr + HALF + c).to(tl.float32)[:, None]
        low, high = load_packed(weights, f, f_ok, step, stride, tl.float32, FORMAT, HALF)
        sums += low * x_low + high * x_high
    return tl.sum(sums, axis=0)
