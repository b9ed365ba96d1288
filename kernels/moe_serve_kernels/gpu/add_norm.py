"""The residual stream and its norm in one launch: what a layer's part has computed is added, the sum is normalised.

    x += scale * (first + sigmoid(gate) * second)         in the dtype of x, which is written back
    out = x / sqrt(mean(x ** 2) + eps) * weight           RMSNorm

Modules take 8 launches for this. One program per token, which holds the whole row.

Shape alphabet: T tokens, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Added(NamedTuple):
    """What is added to the residual stream; nothing at all by default."""

    first: torch.Tensor | None = None
    """[T, H] contiguous."""
    second: torch.Tensor | None = None
    """[T, H] contiguous; only beside `first`."""
    gate: torch.Tensor | None = None
    """[T, 1]: `second` is multiplied by its sigmoid."""


NOTHING = Added()


def add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    added: Added = NOTHING,
    scale: float = 1.0,
    wide: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, H] is added to in place, weight [H] -> [T, H] of x's dtype; float32 inside.

    Rows of x may be the beginnings of longer ones if nothing is added. `wide`: [T, H] float32 that gets the rounded
    result as well.
    """
    num_tokens, hidden = x.shape
    assert x.stride(1) == 1
    assert added.first is None or (x.is_contiguous() and added.first.is_contiguous())
    assert added.second is None or added.second.is_contiguous()
    out = torch.empty(num_tokens, hidden, dtype=x.dtype, device=x.device)
    if num_tokens:
        add_norm_kernel[(num_tokens,)](
            x,
            x if added.first is None else added.first,
            x if added.second is None else added.second,
            x if added.gate is None else added.gate,
            weight,
            out,
            x if wide is None else wide,
            x.stride(0),
            hidden,
            scale,
            eps,
            HAS_FIRST=added.first is not None,
            HAS_SECOND=added.second is not None,
            HAS_GATE=added.gate is not None,
            HAS_WIDE=wide is not None,
            BLOCK_H=triton.next_power_of_2(hidden),
            num_warps=8 if hidden > 2048 else 4,
            enable_fp_fusion=True,
        )
    return out


@triton.jit
def add_norm_kernel(
    x_ptr,
    first_ptr,
    second_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    wide_ptr,
    x_stride,
    hidden,
    scale,
    eps,
    HAS_FIRST: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < hidden
    x = tl.load(x_ptr + token * x_stride + h, mask=inside, other=0.0).to(tl.float32)
    if HAS_FIRST:
        sum = tl.load(first_ptr + token * hidden + h, mask=inside, other=0.0).to(tl.float32)
        if HAS_SECOND:
            second = tl.load(second_ptr + token * hidden + h, mask=inside, other=0.0).to(tl.float32)
            if HAS_GATE:
                second *= tl.sigmoid(tl.load(gate_ptr + token).to(tl.float32))
            sum += second
        rounded = (x + scale * sum).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + token * x_stride + h, rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean = tl.sum(x * x, 0) / hidden
    weight = tl.load(weight_ptr + h, mask=inside, other=0.0).to(tl.float32)
    out = (x / tl.sqrt(mean + eps) * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden + h, out, mask=inside)
    if HAS_WIDE:
        tl.store(wide_ptr + token * hidden + h, out.to(tl.float32), mask=inside)
