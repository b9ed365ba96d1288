"""Finding the fastest configuration of a MoE layer on the GPU at hand.

For each number of tokens: everything in the closed set (configs.py), then the neighbours of the best, one change at a
time, as long as one is faster. A configuration that does not fit the GPU counts as infinitely slow.

Shape alphabet: T tokens, K choices, E experts, S slots, H hidden, I intermediate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu import configs, timing
from moe_serve_kernels.gpu.configs import Config, Gemv, GemvConfig, GroupedConfig, Tile
from moe_serve_kernels.gpu.gpu_model import GpuModel
from moe_serve_kernels.gpu.moe_layer import moe_layer
from moe_serve_kernels.gpu.pool import ExpertPool, empty_bank
from moe_serve_kernels.gpu.tuned import Shape

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
COLD_BYTES = 400 << 20
"""Weights that the timed layers have in all: eight times an H100's L2 cache."""
NOTICEABLE = 0.98
"""A change must save 2 % to count: less is noise."""

Measure = Callable[[Config], float]


def random_layers(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[ExpertPool, list[torch.Tensor]]:
    """A pool of random weights and the slot tables [E] of as many layers as make COLD_BYTES, two at least."""
    both, down = (2, shape.inner, shape.hidden), (shape.hidden, shape.inner)
    probe = empty_bank(1, both, shape.format, dtype, torch.device("meta"))
    layer_bytes = shape.num_experts * sum(t.nbytes for t in probe.parts().values()) * 3 // 2
    num_layers = max(2, math.ceil(COLD_BYTES / layer_bytes))
    num_slots = num_layers * shape.num_experts
    pool = ExpertPool(*(empty_bank(num_slots, size, shape.format, dtype, device) for size in (both, down)))
    for bank in (pool.gate_up, pool.down):
        for tensor in bank.parts().values():
            _fill(tensor)
    order = torch.randperm(num_slots, dtype=torch.int32, device=device)
    return pool, list(order.split(shape.num_experts))


def _fill(tensor: torch.Tensor) -> None:
    """Small numbers of any type; in place and slot by slot, because a pool can fill the memory."""
    for slot in tensor:
        if tensor.dtype in (torch.int8, torch.uint8):
            slot.random_(0, 127)
        else:
            slot.copy_(torch.randn(slot.shape, device=slot.device) * 0.02)


def measure_on(
    pool: ExpertPool, tables: list[torch.Tensor], shape: Shape, num_tokens: int, dtype: torch.dtype
) -> Measure:
    """Seconds per layer of a configuration, with uniform random routing, over all layers in turn."""
    device = pool.down.data.device
    activation = Activation("silu")
    x = torch.randn(num_tokens, shape.hidden, device=device).to(dtype)
    scores = torch.rand(num_tokens, shape.num_experts, device=device)
    weights, ids = scores.topk(shape.top_k)

    def measure(config: Config) -> float:
        calls = [partial(moe_layer, x, ids, weights, table, pool, activation, config) for table in tables]
        try:
            return timing.seconds_per_call(calls)
        except OutOfResources:
            return math.inf

    return measure


def tune(gpu: GpuModel, shape: Shape, num_tokens: int, measure: Measure) -> tuple[Config, float]:
    """The fastest configuration found, and its seconds."""
    per_pair = num_tokens <= configs.GEMV_MAX_TOKENS
    start = [c for c in configs.candidates(gpu, shape.format) if per_pair or isinstance(c, GroupedConfig)]
    times = {config: measure(config) for config in start}
    best = min(times, key=times.__getitem__)
    improved = True
    while improved:
        improved = False
        for config in neighbours(best):
            if config in times:
                continue
            times[config] = measure(config)
            if times[config] < times[best] * NOTICEABLE:
                best, improved = config, True
                break
    return best, times[best]


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ in one number of one of the two products."""
    if isinstance(config, GemvConfig):
        for gemv in _gemvs(config.gate_up):
            yield dataclasses.replace(config, gate_up=gemv)
        for gemv in _gemvs(config.down):
            yield dataclasses.replace(config, down=gemv)
        return
    for tile in _tiles(config.gate_up):
        yield dataclasses.replace(config, gate_up=tile)
    for tile in _tiles(config.down):
        yield dataclasses.replace(config, down=tile)


def _tiles(tile: Tile) -> Iterator[Tile]:
    for stages in (tile.num_stages - 1, tile.num_stages + 1):
        if 2 <= stages <= 5:
            yield dataclasses.replace(tile, num_stages=stages)
    for block_f in (tile.block_f // 2, tile.block_f * 2):
        if 32 <= block_f <= 256:
            yield dataclasses.replace(tile, block_f=block_f)
    yield dataclasses.replace(tile, num_warps=12 - tile.num_warps)
    yield dataclasses.replace(tile, block_c=192 - tile.block_c)
    yield dataclasses.replace(tile, swap=not tile.swap)


def _gemvs(gemv: Gemv) -> Iterator[Gemv]:
    for block_f in (gemv.block_f // 2, gemv.block_f * 2):
        if 4 <= block_f <= 128:
            yield dataclasses.replace(gemv, block_f=block_f)
    for block_c in (gemv.block_c // 2, gemv.block_c * 2):
        if 128 <= block_c <= 2048:
            yield dataclasses.replace(gemv, block_c=block_c)
    yield dataclasses.replace(gemv, num_warps=12 - gemv.num_warps)
