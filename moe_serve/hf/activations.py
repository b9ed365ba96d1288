"""What happens between an expert's two matrix products, read from a Hugging Face config.

Knows names of config fields and of activations; the arithmetic is the kernels'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from moe_serve_kernels.cpu.expert_mlp import Activation, Kind

ActivationOf = Callable[[Any], Activation]
"""Makes a model's Activation from its Hugging Face config (any object with the attributes read)."""

KIND_OF = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Values of `hidden_act` that the supported families use."""


def gated(config: Any) -> Activation:
    """act(gate) * up with the config's `hidden_act`, or `hidden_activation` (SwiGLU in nearly every family)."""
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "silu")
    if name not in KIND_OF:
        raise ValueError(f"hidden_act {name!r} is not one of {', '.join(KIND_OF)}")
    kind: Kind = next(k for k in get_args(Kind) if k == KIND_OF[name])
    return Activation(kind)


def clamped(config: Any) -> Activation:
    """GPT-OSS: (clamp(up) + 1) * gate * sigmoid(alpha * gate), both clamped at `swiglu_limit`."""
    alpha = float(getattr(config, "swiglu_alpha", 1.702))
    return Activation("clamped_swiglu", alpha, float(getattr(config, "swiglu_limit", 7.0)))


def limited(config: Any) -> Activation:
    """DeepSeek-V4: silu(gate) * up, gate clamped at `swiglu_limit` above, up on both sides."""
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} with swiglu_limit is not silu")
    return Activation("limited_silu", limit=float(config.swiglu_limit))


def relu_squared(config: Any) -> Activation:
    """Experts without a gate whose `mlp_hidden_act` is relu2: relu(x) squared is relu(x) * x, x being gate and up."""
    if config.mlp_hidden_act != "relu2":
        raise ValueError(f"mlp_hidden_act {config.mlp_hidden_act!r} is not relu2")
    return Activation("relu")
