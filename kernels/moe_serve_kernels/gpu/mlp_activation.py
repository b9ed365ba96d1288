"""What joins the two halves of a dense MLP's first product, in one launch.

Shape alphabet: T tokens, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_serve_kernels.gpu.activate import activate

BLOCK_I = 512


def mlp_activation(gate_up: torch.Tensor, kind: str, alpha: float, limit: float) -> torch.Tensor:
    """gate_up [T, 2 * I] contiguous, gates first -> [T, I]. The others are an Activation's fields."""
    assert gate_up.is_contiguous()
    num_tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, inner)
    if num_tokens:
        mlp_activation_kernel[(num_tokens, triton.cdiv(inner, BLOCK_I))](
            gate_up,
            out,
            inner,
            alpha,
            limit,
            KIND=kind,
            BLOCK_I=BLOCK_I,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


@triton.jit
def mlp_activation_kernel(gate_up_ptr, out_ptr, inner, alpha, limit, KIND: tl.constexpr, BLOCK_I: tl.constexpr):
    """Grid (T, cdiv(I, BLOCK_I))."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = i < inner
    gate_up_ptr += token * 2 * inner
    gate = tl.load(gate_up_ptr + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + inner + i, mask=inside, other=0.0).to(tl.float32)
    out = activate(gate, up, alpha, limit, KIND).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * inner + i, out, mask=inside)
