"""How the CPU computes experts: our kernel in float32, or torch where the CPU multiplies matrices in bf16 itself."""

from __future__ import annotations

import torch

from expert_cache.running.compute import ExpertCompute
from moe_serve.resolve import has_native_bf16
from moe_serve_kernels.cpu.expert_mlp import Activation

NEVER = 1 << 60
MATRIX_MIN_TOKENS = 32
"""From here on a CPU with matrix instructions is faster in bf16 than our kernel in float32."""
CPU = torch.device("cpu")


def cpu_compute(activation: Activation, dtype: torch.dtype) -> ExpertCompute:
    """ExpertCompute on the CPU for activations of `dtype`."""
    return ExpertCompute(activation, dtype, CPU, _matrix_tokens(dtype))


def _matrix_tokens(dtype: torch.dtype) -> int:
    """Tokens per expert from which torch computes instead of our kernel; 0: always."""
    if dtype == torch.float16:
        return 0
    return MATRIX_MIN_TOKENS if dtype == torch.bfloat16 and has_native_bf16() else NEVER
