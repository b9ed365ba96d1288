"""DeviceRouter: stands where a family's router stood, and chooses in one launch of our kernel.

A captured decoding step of a model with small experts is half a hundred launches per layer; softmax, top-k, sum and
division one by one are five of them. Knows no experts and no cache.

Shape alphabet: T tokens, H hidden, E experts, K choices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_serve.hf.experts import ExpertsProxy
from moe_serve.hf.routers import correction_of
from moe_serve_kernels.routings import Routing


class DeviceRouter(nn.Module):
    """The gate of `router`, with our top-k."""

    def __init__(
        self, router: nn.Module, routing: Routing, logits_dtype: torch.dtype, correction: torch.Tensor | None
    ) -> None:
        """`correction` [E] float32: added to what experts are chosen by."""
        super().__init__()
        self.router = router
        self.routing = routing
        weight, bias = router.weight, getattr(router, "bias", None)
        assert isinstance(weight, torch.Tensor)
        self._weight = weight.detach().to(logits_dtype)
        self._bias = None if bias is None else bias.detach().to(logits_dtype)
        self._correction = correction
        self.logits_dtype = logits_dtype

    def forward(self, hidden: torch.Tensor, *known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [.., H] -> logits [T, E], weights [T, K] float32, ids [T, K] int64: what the families' blocks take.
        `known`: a correction, where the block has it and not the router."""
        rows = hidden.reshape(-1, hidden.shape[-1]).to(self.logits_dtype)
        logits = self._logits(rows)
        ids, weights = self._route(logits)
        return logits, weights, ids

    def choose(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rows [T, H] of `logits_dtype` -> ids [T, K] int64, weights [T, K] float32."""
        return self._route(self._logits(rows))

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, self._weight, self._bias)

    def _route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from moe_serve_kernels.gpu.routing import route  # needs triton, which machines without a GPU may lack

        return route(logits, self.routing, self._correction)


def install(model: nn.Module, routing: Routing | None, num_experts: int) -> None:
    """Put a DeviceRouter in the place of the router beside every ExpertsProxy; None: leave them all."""
    if routing is None:
        return
    for block in list(model.modules()):
        if any(isinstance(child, ExpertsProxy) for child in block.children()):
            for name, child in list(block.named_children()):
                if _is_router(child, num_experts):
                    setattr(block, name, _device_router(child, routing, block))


def router_in(block: nn.Module, routing: Routing) -> DeviceRouter | None:
    """The DeviceRouter of a block with experts: the one that is there, or one for the router that is."""
    for child in block.children():
        if isinstance(child, DeviceRouter):
            return child
        if hasattr(child, "top_k") and isinstance(getattr(child, "weight", None), torch.Tensor):
            return _device_router(child, routing, block)
    return None


def _device_router(router: nn.Module, routing: Routing, block: nn.Module) -> DeviceRouter:
    return DeviceRouter(router, routing, _logits_dtype(router), correction_of(block))


def _is_router(module: nn.Module, num_experts: int) -> bool:
    weight: Any = getattr(module, "weight", None)
    is_gate = isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.shape[0] == num_experts
    return is_gate and hasattr(module, "top_k")


def _logits_dtype(router: nn.Module) -> torch.dtype:
    """Families with a correction compute scores in float32, and so do those that keep their gate in it."""
    weight = router.weight
    assert isinstance(weight, torch.Tensor)
    in_float32 = correction_of(router) is not None or hasattr(router, "routed_scaling_factor")
    return torch.float32 if in_float32 else weight.dtype
