"""The gates of a loaded model: the matrix beside each layer's experts that scores them. Knows no family by name."""

from __future__ import annotations

import torch
from torch import nn

from moe_serve.hf.experts import ExpertsProxy, find_experts
from predictors.methods.next_gate import Router

CORRECTION = "e_score_correction_bias"
"""What families call the bias that counts for the choice and not for the weights."""


def find_routers(model: nn.Module, num_experts: int, hidden_size: int) -> list[Router]:
    """Each MoE layer's gate, in order; [] if one cannot be told."""
    found: list[Router] = []
    siblings = {id(e): m for m in model.modules() for e in m.children() if isinstance(e, ExpertsProxy)}
    for _, experts in sorted(find_experts(model).items()):
        gates: list[Router] = [
            (p, getattr(child, "bias", None))
            for child in siblings[id(experts)].modules()
            for name, p in child.named_parameters(recurse=False)
            if name == "weight" and tuple(p.shape) == (num_experts, hidden_size)
        ]
        if len(gates) != 1:
            return []
        found.append(gates[0])
    return found


def correction_of(module: nn.Module) -> torch.Tensor | None:
    """[E] float32: the correction of the router that `module` is or holds, if it has one."""
    named = [*module.named_buffers(), *module.named_parameters()]
    found = [tensor for name, tensor in named if name.split(".")[-1] == CORRECTION]
    return found[0].detach().float().flatten().contiguous() if found else None
