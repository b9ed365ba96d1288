"""A training forward for Mixtral's experts that sorts tokens by expert instead of masking."""

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

NAME = "moe_serve_sorted"


def sorted_forward(experts: MixtralExperts, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Mix the chosen experts' outputs for each token.

    ``hidden`` is [tokens, width]; ``chosen`` and ``weights`` are [tokens, k]; returns
    [tokens, width].  Weights are unbound once, so their gradients are stacked once instead of
    being accumulated into a full-size tensor for every expert.
    """
    k = chosen.shape[1]
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    counts: list[int] = torch.bincount(flat, minlength=experts.num_experts).tolist()
    groups = torch.split(hidden.index_select(0, order // k), counts)
    outputs = []
    stacks = (experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0))
    for tokens, gate_up, down in zip(groups, *stacks, strict=True):
        gate, up = functional.linear(tokens, gate_up).chunk(2, dim=-1)
        outputs.append(functional.linear(functional.silu(gate) * up, down))
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel())
    back = torch.cat(outputs).index_select(0, position).view(-1, k, hidden.shape[1])
    return (back * weights.unsqueeze(-1)).sum(dim=1)


def register() -> str:
    """Make the implementation known to transformers; returns its name for the config."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_forward)
    return NAME
