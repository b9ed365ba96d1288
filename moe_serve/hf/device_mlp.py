"""What follows attention in a layer on a GPU: experts, a dense MLP, or both, in few launches.

What they return is not added up: the next norm adds it to the residual stream (add_norm.py). Knows no attention.

Shape alphabet: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch

from expert_cache.running.experts import Experts
from moe_serve.hf.device_routers import DeviceRouter
from moe_serve.hf.fused_weights import Fused, fuse
from moe_serve.scheduling.batch_plan import BatchPlan
from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu.add_norm import Added
from moe_serve_kernels.gpu.mlp_activation import mlp_activation
from predictors.shape import MoELayer


class DenseMLP:
    """Gate and up as one product, their activation, and down: 3 launches."""

    def __init__(self, module: Any, activation: Activation) -> None:
        self._gate_up = fuse([module.gate_proj, module.up_proj])
        self._down = fuse([module.down_proj])
        self._activation = activation.kind, activation.alpha, activation.limit

    router: DeviceRouter | None = None

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] -> [T, H]."""
        return self._down(mlp_activation(self._gate_up(hidden), *self._activation))

    def run(self, hidden: torch.Tensor, wide: torch.Tensor | None) -> Added:
        """hidden [T, H], and the same in float32 if a router wants it."""
        return Added(self.product(hidden))


class RoutedExperts:
    """A router, the experts, and perhaps an MLP for all tokens beside them."""

    def __init__(
        self,
        router: DeviceRouter,
        layer: MoELayer,
        experts: Experts[BatchPlan],
        shared: DenseMLP | None,
        gate: Fused | None,
    ) -> None:
        """`gate`: the MLP's results are multiplied by its sigmoid."""
        self.router = router
        self._layer = layer
        self._experts = experts
        self._shared = shared
        self._gate = gate

    def run(self, hidden: torch.Tensor, wide: torch.Tensor | None) -> Added:
        """See DenseMLP."""
        ids, weights = self.router.choose(hidden if wide is None else wide)
        beside: list[torch.Tensor] = []

        def work() -> None:
            if self._shared is not None:
                beside.append(self._shared.product(hidden))
            if self._gate is not None:
                beside.append(self._gate(hidden))

        mixed = self._experts.run(self._layer, hidden, ids, weights, meanwhile=work)
        return Added(mixed, *beside)
