"""What the kernels of a CPU compute, in plain torch and in the dtype of their inputs: the definition that tests
compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from moe_serve_kernels.cpu.expert_mlp import Activation, Matrix, MLPWeights, activate, as_tensor
from moe_serve_kernels.routings import Routing


def expert_mlp_reference(
    x: torch.Tensor,
    tokens: torch.Tensor,
    segments: Sequence[tuple[int, int]],
    weights: Sequence[MLPWeights],
    activation: Activation,
    out: torch.Tensor,
) -> None:
    """As `expert_mlp`."""
    for (start, end), expert in zip(segments, weights, strict=True):
        rows = x[tokens[start:end]]
        gate = _linear(rows, expert.gate, expert.gate_bias)
        up = _linear(rows, expert.up, expert.up_bias)
        out[start:end] = _linear(activate(activation, gate, up), expert.down, expert.down_bias)


def _linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, as_tensor(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def expert_layer_reference(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Sequence[MLPWeights], activation: Activation
) -> torch.Tensor:
    """As `ExpertLayer.run`, without its counts."""
    out = x.new_empty(ids.numel(), x.shape[1])
    tokens = torch.arange(ids.numel()) // ids.shape[1]
    chosen = [experts[e] for e in ids.flatten().tolist()]
    expert_mlp_reference(x, tokens, [(p, p + 1) for p in range(ids.numel())], chosen, activation, out)
    return (out.view(*ids.shape, -1) * weights[..., None]).sum(1)


def paged_decode_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `paged_decode`, one sequence at a time."""
    groups = query.shape[1] // keys.shape[0]
    rows = []
    for n, length in enumerate(lengths.tolist()):
        positions = torch.arange(max(0, length - window) if window else 0, length)
        slots = page_table[n][positions // page_size] * page_size + positions % page_size
        own_keys = keys[:, slots].repeat_interleave(groups, 0)
        scores = torch.einsum("hd,hcd->hc", query[n], own_keys) * scale
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None].to(scores.dtype)], dim=1)
        weights = scores.softmax(dim=-1)[:, : len(slots)]
        rows.append(torch.einsum("hc,hcd->hd", weights, values[:, slots].repeat_interleave(groups, 0)))
    return torch.stack(rows)


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
