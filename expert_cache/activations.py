"""What happens between an expert's two matrix products: gate and up join into one tensor.

Each maker takes the Hugging Face config (any object with the attributes it reads) and returns a
Gate. Knows torch only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(gate [t, I], up [t, I]) -> [t, I]. May overwrite its inputs."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""Values of `hidden_act` that the supported families use."""


def silu_gate(config: Any) -> Gate:
    """act(gate) * up with the config's `hidden_act` (SwiGLU in nearly every family)."""
    name = getattr(config, "hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not one of {', '.join(ACTIVATIONS)}")
    activation = ACTIVATIONS[name]

    def gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return activation(gate).mul_(up)

    return gate_up


def clamped_gate(config: Any) -> Gate:
    """GPT-OSS: (clamp(up) + 1) * gate * sigmoid(alpha * gate), both clamped at `swiglu_limit`."""
    alpha = float(getattr(config, "swiglu_alpha", 1.702))
    limit = float(getattr(config, "swiglu_limit", 7.0))

    def gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))

    return gate_up
