"""The weighted sum of each token's experts.

    out[t] = sum over k, in order, of weights[t, k] * outputs[t * K + k]

Choices whose expert is in no slot are left out, as are negative ids, which mark padding.
No atomics: the order of the sum is the router's, so the result does not depend on which expert came first.

Shape alphabet: T tokens, K choices, P = T * K pairs, E experts, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_serve_kernels.gpu.operands import slot_of_choice

BLOCK_F = 1024


def combine(
    outputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor, out: torch.Tensor
) -> None:
    """outputs [P, H], ids and weights [T, K], slot_of [E] int32 -> out [T, H], summed in float32. All contiguous."""
    assert all(t.is_contiguous() for t in (outputs, ids, weights, out))
    if ids.numel():
        hidden = out.shape[1]
        combine_kernel[(ids.shape[0], triton.cdiv(hidden, BLOCK_F))](
            outputs,
            ids,
            weights,
            slot_of,
            out,
            hidden,
            TOP_K=ids.shape[1],
            BLOCK_F=BLOCK_F,
            num_warps=4,
            enable_fp_fusion=True,
        )


@triton.jit
def combine_kernel(
    outputs_ptr, ids_ptr, weights_ptr, slot_of_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Grid (T, cdiv(H, BLOCK_F))."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros([BLOCK_F], tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        length = tl.where(slot_of_choice(ids_ptr, slot_of_ptr, pair) < 0, 0, hidden)
        one = tl.load(outputs_ptr + pair * hidden + f, mask=f < length, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + pair).to(tl.float32) * one
    tl.store(out_ptr + token * hidden + f, total.to(out_ptr.dtype.element_ty), mask=f < hidden)
