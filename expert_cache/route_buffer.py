"""RouteBuffer: what the routers chose during one forward pass, for those who record or forecast.

Keeps the routers' own tensors and copies nothing until the pass is over, so that a GPU is not waited for
in every layer. Knows no tokens' owners.

Shape alphabet: T tokens of the pass, L MoE layers, K choices per token, E experts.
"""

from __future__ import annotations

import torch

from expert_cache.policies.policy import Floats, Ints


class RouteBuffer:
    """Off until someone wants to know: then `add` once per layer, and `take` after each pass."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.is_on = False
        self.keeps_weights = False
        self._num_layers = num_layers
        self._dtype = torch.uint8 if num_experts <= 256 else torch.int16
        self._ids: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def add(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """The next layer's choices [T, K] and their weights."""
        self._ids.append(ids)
        if self.keeps_weights:
            self._weights.append(weights)

    def clear(self) -> None:
        """Forget a pass that failed."""
        self._ids.clear()
        self._weights.clear()

    def take(self) -> tuple[Ints, Floats | None]:
        """ids [T, L, K] and weights [T, L, K] float32 (None unless kept) of the pass that has just ended."""
        assert len(self._ids) == self._num_layers, "a layer's router was not seen, or twice"
        ids: Ints = torch.stack(self._ids, dim=1).to(self._dtype).cpu().numpy()
        weights: Floats | None = None
        if self.keeps_weights:
            weights = torch.stack(self._weights, dim=1).float().cpu().numpy()
        self.clear()
        return ids, weights
