"""How the CPU computes experts: our kernels, or torch in float16, which they do not know."""

from __future__ import annotations

import torch

from expert_cache.running.compute import ExpertCompute
from moe_serve_kernels.cpu.expert_mlp import Activation

NEVER = 1 << 60
CPU = torch.device("cpu")


def cpu_compute(activation: Activation, dtype: torch.dtype) -> ExpertCompute:
    """ExpertCompute on the CPU for activations of `dtype`."""
    return ExpertCompute(activation, dtype, CPU, matrix_tokens=0 if dtype == torch.float16 else NEVER)
