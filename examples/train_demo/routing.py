"""What the routers do with a text: expert load per layer, and affinity between layers."""

from itertools import pairwise

import torch
from torch import Tensor
from transformers import MixtralForCausalLM


@torch.no_grad()
def chosen_experts(model: MixtralForCausalLM, windows: Tensor) -> Tensor:
    """Experts chosen for every token, best first: [layers, tokens, top_k].

    ``windows`` is [rows, length] token ids; rows are run one by one and their tokens joined.
    """
    top_k = model.config.num_experts_per_tok
    rows = []
    for row in windows:
        output = model(row[None], output_router_logits=True, use_cache=False)
        logits = torch.stack(output.router_logits)
        rows.append(logits.topk(top_k, dim=-1).indices)
    return torch.cat(rows, dim=1)


def load_imbalance(chosen: Tensor, experts: int) -> list[float]:
    """Busiest expert's load over the mean load, for each layer of [layers, tokens, top_k]."""
    counts = [torch.bincount(layer.flatten(), minlength=experts) for layer in chosen]
    return [float(count.max() / count.float().mean()) for count in counts]


def mutual_information(left: Tensor, right: Tensor, experts: int) -> float:
    """Plug-in mutual information in bits of two [tokens] expert choices."""
    joint = torch.bincount(left * experts + right, minlength=experts**2).double()
    joint = (joint / joint.sum()).reshape(experts, experts)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    used = joint > 0
    return float((joint[used] * (joint[used] / independent[used]).log2()).sum())


def layer_affinity(chosen: Tensor, experts: int, seed: int = 0) -> list[tuple[float, float]]:
    """For each pair of adjacent layers: top-1 mutual information, and with tokens shuffled."""
    shuffle = torch.randperm(chosen.shape[1], generator=torch.Generator().manual_seed(seed))
    best = chosen[:, :, 0]
    return [
        (
            mutual_information(left, right, experts),
            mutual_information(left, right[shuffle], experts),
        )
        for left, right in pairwise(best)
    ]
