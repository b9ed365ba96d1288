"""The gates of a loaded model: the matrix beside each layer's experts that scores them. Knows no family by name."""

from __future__ import annotations

import torch
from torch import nn

from moe_serve.hf.experts import SlottedExperts, find_experts


def find_routers(
    model: nn.Module, num_experts: int, hidden_size: int
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """(weight [E, H], bias [E] or None) of each MoE layer in order; [] if a layer's gate cannot be told."""
    found = []
    siblings = {id(e): m for m in model.modules() for e in m.children() if isinstance(e, SlottedExperts)}
    for _, experts in sorted(find_experts(model).items()):
        gates = [
            (p, getattr(child, "bias", None))
            for child in siblings[id(experts)].modules()
            for name, p in child.named_parameters(recurse=False)
            if name == "weight" and tuple(p.shape) == (num_experts, hidden_size)
        ]
        if len(gates) != 1:
            return []
        found.append(gates[0])
    return found
