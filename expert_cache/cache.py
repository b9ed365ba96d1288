"""ExpertCache: runs a MoE layer's experts for the tokens routed to them.

Regroups tokens by expert, asks for each expert's compute-ready form, and combines the results.
A token's sum over experts runs in the same order whatever is resident; what may differ with the
budget is the layout of one matrix product, i.e. its last bits. Knows nothing of models, requests
or routers.

Shape alphabet: T tokens, H hidden, K choices per token.
"""

from __future__ import annotations

import torch

from expert_cache.regroup import regroup
from expert_cache.resident import ResidentExperts


class ExpertCache:
    """The experts of all layers behind one call."""

    def __init__(self, resident: ResidentExperts) -> None:
        self.resident = resident

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        hidden [T, H]; ids [T, K] int64; weights [T, K] (float32 or hidden's dtype) -> [T, H].
        """
        if ids.shape[0] == 1:
            return self._run_one(layer, hidden, ids[0].tolist(), weights)
        groups = regroup(ids, self.resident.store.num_experts)
        inputs = hidden.index_select(0, groups.tokens)
        outputs = [
            self.resident.get(layer, expert, end - start)(inputs[start:end]) for expert, start, end in groups.segments()
        ]
        by_pair = torch.empty_like(inputs).index_copy_(0, groups.pairs, torch.cat(outputs))
        return _combine(by_pair.view(*ids.shape, -1), weights, hidden.dtype)

    def _run_one(self, layer: int, hidden: torch.Tensor, ids: list[int], weights: torch.Tensor) -> torch.Tensor:
        """A single token needs no regrouping."""
        outputs = [self.resident.get(layer, expert, 1)(hidden) for expert in ids]
        return _combine(torch.cat(outputs)[None], weights, hidden.dtype)


def _combine(outputs: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """outputs [T, K, H], weights [T, K] -> [T, H]; the sum over K runs in float32 or wider."""
    weighted = outputs.to(torch.promote_types(dtype, torch.float32)) * weights[..., None]
    return weighted.sum(dim=1).to(dtype)
