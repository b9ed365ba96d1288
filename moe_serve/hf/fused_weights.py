"""Linear layers that read the same input, as one: their weights lie one below the other, and one product makes all.

The layers go on working: their parameters become views of the fused ones, and nothing takes memory twice. Knows no
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


class Fused(NamedTuple):
    """A linear layer's parameters."""

    weight: torch.Tensor
    """[outputs, inputs]."""
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, inputs] -> [T, outputs]."""
        return nn.functional.linear(x, self.weight, self.bias)


@torch.no_grad()
def fuse(layers: Sequence[nn.Linear]) -> Fused:
    """The layers as one, in their order. All of one dtype, on one device; a missing bias is 0 beside others."""
    if len(layers) == 1:
        (layer,) = layers
        return Fused(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None
    if any(layer.bias is not None for layer in layers):
        parts = [weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        bias = torch.cat([part.detach() for part in parts])
    first = 0
    for layer in layers:
        rows = slice(first, first + layer.out_features)
        layer.weight = nn.Parameter(weight[rows], requires_grad=False)
        if bias is not None and layer.bias is not None:
            layer.bias = nn.Parameter(bias[rows], requires_grad=False)
        first = rows.stop
    return Fused(weight, bias)
