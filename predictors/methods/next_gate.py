"""The next layer's gate on this layer's hidden states: a forecast that needs no training.

The residual stream changes little from one layer to the next, so a router applied one layer early
mostly chooses what it will choose (mixtral-offloading's speculative loading, arXiv 2312.17238).

Shape alphabet: T tokens, H hidden, L layers by dense index, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Router = tuple[torch.Tensor, torch.Tensor | None]
"""(weight [E, H], bias [E] or None) of one layer's gate."""


class NextGate:
    """Expected uses of a later layer's experts."""

    def __init__(self, routers: Sequence[Router]) -> None:
        """`routers` by dense layer index; they are not copied."""
        self._routers = routers

    def scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[E] for `layer`: probabilities summed over tokens; `hidden` [T, H] goes into an earlier layer's experts."""
        weight, bias = self._routers[layer]
        logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
        return logits.float().softmax(dim=-1).sum(dim=0)
