"""One MoE layer's experts on a GPU, from the router's choice to the weighted sum, without waiting for the device.

    few tokens:   gemv gate_up -> gemv down with the sum                     2 launches (3 with few output tiles)
    otherwise:    align -> gate_up -> down -> combine                        4 launches (6 beyond 512 pairs)

Shape alphabet: T tokens, K choices, P = T * K pairs, E experts, H hidden, I intermediate, S slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu import configs, gemv, grouped, tuned
from moe_serve_kernels.gpu.align import align, align_segments
from moe_serve_kernels.gpu.combine import combine
from moe_serve_kernels.gpu.configs import Config, GemvConfig, GroupedConfig
from moe_serve_kernels.gpu.fallback import run_first_that_fits
from moe_serve_kernels.gpu.gpu_model import device_name, model_of
from moe_serve_kernels.gpu.pool import ExpertPool


def moe_layer(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    pool: ExpertPool,
    activation: Activation,
    config: Config | None = None,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs -> [T, H] of x's dtype.

    x [T, H] float32, float16 or bf16; ids [T, K] any integer type; weights [T, K] any float type; slot_of [E] int32.
    Choices whose expert is in no slot add nothing, nor do negative ids (padding). `config`: tile sizes; None: chosen by
    shape, from the tuned ones where there are any, and smaller where the GPU refuses the choice. OutOfResources: the
    GPU refuses `config`, or every choice.
    """
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    chosen = config or config_for(x, ids, slot_of.shape[0], pool)
    out = torch.empty_like(x)
    if isinstance(chosen, GemvConfig):
        act = gemv.gemv_gate_up(x, ids, pool.gate_up, slot_of, activation, chosen.gate_up)
        gemv.gemv_down(act, ids, weights, pool.down, slot_of, out, chosen.down)
    else:
        outputs = torch.empty(ids.numel(), x.shape[1], dtype=_sum_dtype(x), device=x.device)
        choices = [chosen] if config else _fallbacks(x, pool, chosen)
        run_first_that_fits(choices, lambda choice: _grouped(x, ids, slot_of, pool, activation, outputs, choice))
        combine(outputs, ids, weights, slot_of, out)
    return out


def run_pairs(
    x: torch.Tensor,
    ids: torch.Tensor,
    slot_of: torch.Tensor,
    pool: ExpertPool,
    activation: Activation,
    outputs: torch.Tensor,
    config: GroupedConfig | None = None,
) -> None:
    """Fill the rows of `outputs` [P, H] whose pair's expert is in a slot, and leave the others as they are.

    For experts that come in waves: one call per wave with a table of that wave, then `combine` with all in.
    """
    x, ids = x.contiguous(), ids.contiguous()
    choices = [config] if config else _fallbacks(x, pool, _grouped_config(x, ids, slot_of.shape[0], pool))
    run_first_that_fits(choices, lambda choice: _grouped(x, ids, slot_of, pool, activation, outputs, choice))


def run_segments(
    x: torch.Tensor,
    tokens: torch.Tensor,
    segments: Sequence[tuple[int, int]],
    slots: Sequence[int],
    pool: ExpertPool,
    activation: Activation,
    outputs: torch.Tensor,
) -> None:
    """For pairs that the host has sorted: fill the rows of `outputs` [P, H] that lie in `segments`, and no other.

    x [T, H] contiguous; tokens [P] the row of x of each pair; segments[i] = (start, end): the pairs of the expert in
    slots[i].
    """
    num_pairs = sum(end - start for start, end in segments)
    chosen = configs.by_tokens(_steps(x, pool), num_pairs / max(1, len(segments)))
    in_place = torch.arange(len(tokens), dtype=torch.int32, device=x.device)

    def run(config: GroupedConfig) -> None:
        aligned, slot_of = align_segments(tokens, segments, slots, config.gate_up.block_t)
        act = grouped.gate_up(x, pool.gate_up, slot_of, aligned, 1, activation, config.gate_up)
        grouped.down(act, pool.down, slot_of, dataclasses.replace(aligned, pairs=in_place), outputs, config.down)

    run_first_that_fits(_fallbacks(x, pool, chosen), run)


def _grouped(
    x: torch.Tensor,
    ids: torch.Tensor,
    slot_of: torch.Tensor,
    pool: ExpertPool,
    activation: Activation,
    outputs: torch.Tensor,
    config: GroupedConfig,
) -> None:
    aligned = align(ids, slot_of.shape[0], config.gate_up.block_t)
    act = grouped.gate_up(x, pool.gate_up, slot_of, aligned, ids.shape[1], activation, config.gate_up)
    grouped.down(act, pool.down, slot_of, aligned, outputs, config.down)


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    """Nothing is rounded before the sum over the choices."""
    return torch.promote_types(x.dtype, torch.float32)


def config_for(x: torch.Tensor, ids: torch.Tensor, num_experts: int, pool: ExpertPool) -> Config:
    """What `moe_layer` uses for such a call: the tuned configuration if there is one."""
    num_tokens, top_k = ids.shape
    is_tuned = x.is_cuda and x.dtype != torch.float32
    tuned_ones = tuned.load(device_name(x.device)) if is_tuned else {}
    shape = tuned.Shape(pool.hidden, pool.inner, num_experts, top_k, pool.format)
    found = tuned.find(tuned_ones, shape, num_tokens)
    is_float32 = x.dtype == torch.float32
    return found or configs.choose(model_of(x.device), pool.format, num_tokens, top_k, num_experts, is_float32)


def _grouped_config(x: torch.Tensor, ids: torch.Tensor, num_experts: int, pool: ExpertPool) -> GroupedConfig:
    chosen = config_for(x, ids, num_experts, pool)
    return chosen if isinstance(chosen, GroupedConfig) else next(iter(_steps(x, pool).values()))


def _steps(x: torch.Tensor, pool: ExpertPool) -> dict[int, GroupedConfig]:
    return configs.steps_of(model_of(x.device), pool.format, x.dtype == torch.float32)


def _fallbacks(x: torch.Tensor, pool: ExpertPool, config: GroupedConfig) -> list[GroupedConfig]:
    """`config` and what is smaller. float32 has one size, which needs next to nothing."""
    if x.dtype == torch.float32:
        return [config]
    return [config, *configs.smaller(model_of(x.device), pool.format, config)]
