"""How the supported families choose experts: what a routing kernel has to know, and its definition. Needs no triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Routing:
    """How a family chooses."""

    top_k: int
    score: Literal["softmax", "sigmoid", "softmax_of_chosen"]
    renormalize: bool = False
    """Divide the weights by their sum."""
    scaling: float = 1.0
    """Multiply the weights, last of all."""
    num_groups: int = 1
    top_groups: int = 1
    """Only experts in the best groups can be chosen."""
    best_of_group: Literal[1, 2] = 2
    """A group is worth the sum of so many of its best experts: one in DeepSeek-V2, two in DeepSeek-V3."""


def route_reference(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E], bias [E] -> ids [T, K] int64, weights [T, K], best first; in float32 at least. Of equal scores the
    first expert is chosen, of equal groups the first."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "softmax_of_chosen": logits}[routing.score]
    ranks = scores if bias is None else scores + bias
    if routing.top_groups < routing.num_groups:
        groups = ranks.view(len(ranks), routing.num_groups, -1)
        worth = groups.topk(min(routing.best_of_group, groups.shape[-1]), dim=-1).values.sum(-1)
        best = worth.argsort(dim=-1, descending=True, stable=True)[:, : routing.top_groups]
        kept = torch.zeros_like(worth).scatter_(1, best, 1.0)
        ranks = torch.where(kept[..., None] > 0, groups, -torch.inf).flatten(1)
    ids = ranks.argsort(dim=-1, descending=True, stable=True)[:, : routing.top_k]
    weights = scores.gather(1, ids)
    if routing.score == "softmax_of_chosen":
        weights = weights.softmax(-1)
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * routing.scaling
