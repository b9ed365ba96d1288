"""A product of tiles inside our kernels, in the precision of its inputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a @ b with float32 sums. UPCAST: Triton's interpreter multiplies bf16 wrongly, so there they become float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")
