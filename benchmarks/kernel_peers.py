"""Other implementations of a MoE layer's experts, over the same weights, for bench_kernels.py.

A peer that cannot be imported or that refuses a shape is left out, and the reason is printed.

Shape alphabet: E experts, H hidden, I intermediate, T tokens, K choices.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x [T, H], ids [T, K] int64, weights [T, K] -> [T, H]."""
MakeLayer = Callable[[torch.Tensor, torch.Tensor], Layer]
"""gate_up [E, 2I, H], down [E, H, I] -> a layer that reads them where they are."""


def peers() -> Iterator[tuple[str, MakeLayer, bool]]:
    """(name, maker, whether it can be captured in a graph) of everything that is installed."""
    yield "torch grouped_mm", torch_grouped, True
    for name, captured in (("grouped_mm", True), ("batched_mm", True), ("eager", False)):
        yield f"transformers {name}", transformers_experts(name), captured
    if (liger := _found("liger_kernel.ops.fused_moe")) is not None:
        yield "Liger", liger_layer(liger), False
    if (vllm := _found("vllm.model_executor.layers.fused_moe")) is not None:
        yield "vLLM fused_moe", vllm_layer(vllm), True


def _found(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"without {module}: {error}")
        return None


def torch_grouped(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
    """Sorted pairs, torch's grouped matrix products, everything else one operation at a time."""
    num_experts = len(gate_up)
    by_input = gate_up.transpose(1, 2), down.transpose(1, 2)

    def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(num_experts, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(x[order // ids.shape[1]], by_input[0], offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, by_input[1], offs=ends)
        by_pair = torch.empty_like(rows).index_copy_(0, order, rows)
        return (by_pair.view(*ids.shape, -1).float() * weights[..., None]).sum(1).to(x.dtype)

    return layer


def transformers_experts(implementation: str) -> MakeLayer:
    """Qwen3-MoE's experts class, one of transformers' implementations."""

    def make(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            num_experts=len(gate_up), hidden_size=down.shape[1], moe_intermediate_size=down.shape[2]
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(down, requires_grad=False)
        return lambda x, ids, weights: experts(x, ids, weights.to(x.dtype))

    return make


def liger_layer(module: SimpleNamespace) -> MakeLayer:
    def make(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
        apply = module.LigerFusedMoEFunction.apply
        return lambda x, ids, weights: apply(x, gate_up, down, ids, weights.to(x.dtype))

    return make


def vllm_layer(module: SimpleNamespace) -> MakeLayer:
    def make(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
        return lambda x, ids, weights: module.fused_experts(x, gate_up, down, weights, ids.to(torch.int32))

    return make
