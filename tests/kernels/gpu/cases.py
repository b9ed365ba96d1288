"""Small MoE layers for the kernel tests, with every slot that nothing may read poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_serve_kernels.gpu.pool import Bank, ExpertPool, empty_bank
from moe_serve_kernels.gpu.weight_format import Format
from tests.support.gpu_references import fill_slot, quantize


@dataclass(frozen=True)
class Layer:
    """x [T, H], ids [T, K], weights [T, K], slot_of [E] and the pool they refer to."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    slot_of: torch.Tensor
    pool: ExpertPool


def make_pool(
    num_experts: int,
    hidden: int,
    inner: int,
    device: torch.device,
    format: Format = "plain",
    dtype: torch.dtype = torch.float32,
    with_bias: bool = False,
    group_size: int = 32,
) -> tuple[ExpertPool, torch.Tensor]:
    """Experts in slots in reverse order, two slots more than experts -> pool, slot_of."""
    shapes = {"gate_up": (2, inner, hidden), "down": (hidden, inner)}
    banks: dict[str, Bank] = {}
    for name, shape in shapes.items():
        bank = empty_bank(num_experts + 2, shape, format, dtype, device, with_bias=with_bias, group_size=group_size)
        for tensor in bank.parts().values():
            poison(tensor)
        for expert in range(num_experts):
            parts = quantize(torch.randn(shape, device=device) * shape[-1] ** -0.5, format, group_size)
            if with_bias:
                parts["bias"] = torch.randn(shape[:-1], device=device)
            fill_slot(bank, num_experts - expert, parts)
        banks[name] = bank
    slot_of = torch.arange(num_experts, 0, -1, dtype=torch.int32, device=device)
    return ExpertPool(banks["gate_up"], banks["down"]), slot_of


def poison(tensor: torch.Tensor) -> None:
    """NaN, or the largest byte (which is NaN in e4m3)."""
    if tensor.dtype.is_floating_point and tensor.dtype != torch.float8_e4m3fn:
        tensor.fill_(torch.nan)
    else:
        tensor.view(torch.uint8).fill_(127)


def make_layer(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    inner: int,
    device: torch.device,
    *,
    routing: str = "random",
    dtype: torch.dtype = torch.float32,
    format: Format = "plain",
    with_bias: bool = False,
    group_size: int = 32,
) -> Layer:
    """`routing`: random, "one" expert for all, "all" experts used evenly; weights of plain pools are in `dtype`."""
    pool, slot_of = make_pool(num_experts, hidden, inner, device, format, dtype, with_bias, group_size)
    x = torch.randn(num_tokens, hidden, device=device).to(dtype)
    weights = torch.rand(num_tokens, top_k, device=device)
    return Layer(x, make_ids(num_tokens, top_k, num_experts, routing).to(device), weights, slot_of, pool)


def make_ids(num_tokens: int, top_k: int, num_experts: int, routing: str) -> torch.Tensor:
    if routing == "one":
        return torch.full((num_tokens, top_k), num_experts - 1)
    if routing == "all":
        return torch.arange(num_tokens * top_k).view(num_tokens, top_k) % num_experts
    return torch.rand(num_tokens, num_experts).topk(top_k).indices if num_tokens else torch.empty(0, top_k).long()
