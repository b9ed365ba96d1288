"""What joins gate and up, inside a kernel; the torch reference is `moe_serve_kernels.cpu.expert_mlp.activate`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(gate, up, alpha, limit, KIND: tl.constexpr):
    """gate, up float32 of one shape -> float32. KIND is an Activation's `kind`; alpha, limit are the clamped ones'."""
    if KIND == "clamped_swiglu" or KIND == "limited_silu":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if KIND == "clamped_swiglu":
        return (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    elif KIND == "silu" or KIND == "limited_silu":
        return gate * tl.sigmoid(gate) * up
    elif KIND == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner) * up
    else:
        tl.static_assert(KIND == "relu")
        return tl.maximum(gate, 0.0) * up
