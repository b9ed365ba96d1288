"""Every kernel launch there can be, by name: what compile_check compiles.

Shapes stand for what a compiled kernel depends on (data types, divisibility by 16), not for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import torch

from moe_serve_kernels.cpu.decoder import Rotary
from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu import (
    add_norm,
    align,
    coded_link,
    combine,
    configs,
    gemv,
    grouped,
    mlp_activation,
    paged_attention,
    prompt_attention,
    residency,
    rotary,
    routing,
)
from moe_serve_kernels.gpu.configs import Gemv, Tile
from moe_serve_kernels.gpu.gpu_model import GpuModel
from moe_serve_kernels.gpu.pool import Bank, empty_bank
from moe_serve_kernels.gpu.weight_format import FORMATS, GROUP_SIZE, Format
from moe_serve_kernels.routings import Routing

META = torch.device("meta")
SLOTS, HIDDEN, INNER, TOP_K, EXPERTS = 64, 2048, 1024, 4, 64
SILU, GPT_OSS = Activation("silu"), Activation("clamped_swiglu")


WGMMA = "wgmma"
MMA = "mma"


@dataclass(frozen=True, slots=True)
class Launch:
    """One operation in one configuration: `call` launches its kernels, on tensors without memory."""

    name: str
    call: Callable[[], object]
    mma: Mapping[str, str] = field(default_factory=dict)
    """Kernel -> matrix instruction it must use on a GPU that has it; the others use none."""


def launches(gpu: GpuModel) -> Iterator[Launch]:
    """All of them for a GPU."""
    yield from _around()
    yield from _small_groups(gpu)
    yield from _last_resorts()
    for format in FORMATS:
        gemvs = configs.GEMV[format]
        yield Launch(f"{format}", partial(_gemv_gate_up, format, gemvs.gate_up))
        yield Launch(f"{format}", partial(_gemv_down, format, gemvs.down))
        if gemv.is_split(_ids(1), HIDDEN, gemvs.down):
            yield Launch(f"{format}, a pair each", partial(_gemv_down, format, gemvs.down, num_tokens=1))
        for config in configs.steps_of(gpu, format).values():
            for activation in (SILU, GPT_OSS):
                name = f"{format} {_shape(config.gate_up)} {activation.kind}"
                yield Launch(name, partial(_gate_up, format, activation, config.gate_up), {"gate_up_kernel": WGMMA})
            yield Launch(f"{format} {_shape(config.down)}", partial(_down, format, config.down), {"down_kernel": WGMMA})


def _shape(tile: Tile) -> str:
    swap = " swap" if tile.swap else ""
    return f"{tile.block_t}x{tile.block_f}x{tile.block_c} w{tile.num_warps} s{tile.num_stages}{swap}"


def _new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def _ids(num_tokens: int) -> torch.Tensor:
    return _new(num_tokens, TOP_K, dtype=torch.int64)


def _slot_of() -> torch.Tensor:
    return _new(EXPERTS, dtype=torch.int32)


def _bank(
    shape: tuple[int, ...],
    format: Format,
    with_bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    group_size: int = GROUP_SIZE,
) -> Bank:
    return empty_bank(SLOTS, shape, format, dtype, META, with_bias=with_bias, group_size=group_size)


def _around() -> Iterator[Launch]:
    """Everything but the experts in bf16; exact products in float32 use no matrix instruction."""
    yield Launch("float32", partial(_gate_up, "plain", SILU, configs.FLOAT32.gate_up, torch.float32))
    yield Launch("float32", partial(_down, "plain", configs.FLOAT32.down, torch.float32))
    yield Launch("float32 latents", partial(_latent_attention, 16, torch.float32))
    for num_pairs in (128, align.ONE_BLOCK_PAIRS, 2 * align.ONE_BLOCK_PAIRS):
        yield Launch(f"{num_pairs} pairs", partial(align.align, _ids(num_pairs // TOP_K), EXPERTS, 16))
    yield Launch("", _combine)
    yield Launch("top-k of 64", partial(routing.route, _new(8, 64), Routing(8, "softmax")))
    grouped_routing = Routing(8, "sigmoid", True, 2.5, 8, 4)
    yield Launch("8 groups of 256", partial(_route, grouped_routing, 256))
    by_best = Routing(6, "softmax", scaling=16.0, num_groups=8, top_groups=3, best_of_group=1)
    yield Launch("8 groups of 160", partial(routing.route, _new(8, 160, dtype=torch.float32), by_best))
    for head_dim in (64, 128, 192):
        yield Launch(f"head dim {head_dim}", partial(_attention, head_dim), {"attend_split": MMA})
    for num_heads in (16, 128):
        yield Launch(f"latents, {num_heads} heads", partial(_latent_attention, num_heads), {"attend_split": MMA})
    for head_dim, window in ((64, 128), (128, None), (192, None)):  # with sinks; as most; keys longer than values
        name = f"head dim {head_dim}, {'all' if window is None else 'a window'}"
        yield Launch(name, partial(_prompts, head_dim, window), {"attend_prompts": WGMMA})
    yield Launch("float32", partial(_prompts, 128, None, torch.float32))
    yield Launch("latents", _prompts_of_latents, {"attend_prompts": WGMMA})
    for kind in get_args(Rotary):
        yield Launch(kind, partial(_rotate_heads, kind))
        yield Launch(kind, partial(_rotate_latents, kind))
    for hidden in (2048, 4096, 7168):
        yield Launch(f"{hidden}", partial(_add_norm, hidden))
    yield Launch("", partial(mlp_activation.mlp_activation, _new(4, 2 * INNER), SILU.kind, SILU.alpha, SILU.limit))
    for num_slots in (32, 1024):
        yield Launch(f"{num_slots} slots", partial(_plan, num_slots))
    yield Launch("", _copy)
    yield Launch("", _decode)


def _small_groups(gpu: GpuModel) -> Iterator[Launch]:
    """int4 in groups below 128: other checkpoints' choice, with shorter loop steps."""
    gemvs = configs.GEMV["int4"]
    for size in (32, 64):
        yield Launch(f"int4 g{size}", partial(_gemv_gate_up, "int4", gemvs.gate_up, size))
        yield Launch(f"int4 g{size}", partial(_gemv_down, "int4", gemvs.down, size))
        for config in configs.steps_of(gpu, "int4").values():
            gate_up = partial(_gate_up, "int4", SILU, config.gate_up, group_size=size)
            down = partial(_down, "int4", config.down, group_size=size)
            yield Launch(f"int4 g{size} {_shape(config.gate_up)}", gate_up, {"gate_up_kernel": WGMMA})
            yield Launch(f"int4 g{size} {_shape(config.down)}", down, {"down_kernel": WGMMA})


def _last_resorts() -> Iterator[Launch]:
    """What runs where the GPU refuses everything else."""
    smallest = configs.FLOAT32
    for format in FORMATS:
        gate_up = partial(_gate_up, format, GPT_OSS, smallest.gate_up)
        yield Launch(f"{format} last resort", gate_up, {"gate_up_kernel": MMA})
        yield Launch(f"{format} last resort", partial(_down, format, smallest.down), {"down_kernel": MMA})


def _route(routing_: Routing, num_experts: int) -> None:
    routing.route(_new(8, num_experts), routing_, _new(num_experts, dtype=torch.float32))


def _attention(head_dim: int) -> None:
    pages = _new(4, 64, dtype=torch.int64)
    lengths = _new(4, dtype=torch.int64)
    cache = _new(8, 4096, head_dim), _new(8, 4096, min(head_dim, 128))
    paged_attention.paged_decode(_new(4, 32, head_dim), *cache, pages, lengths, page_size=16, scale=0.1)


def _latent_attention(num_heads: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """DeepSeek-V2-Lite has 16 heads, V3 128."""
    pages = _new(4, 64, dtype=torch.int64)
    lengths = _new(4, dtype=torch.int64)
    rows = _new(1, 4096, 512 + 64, dtype=dtype)
    query = _new(4, num_heads, 512 + 64, dtype=dtype)
    paged_attention.paged_decode(query, rows, rows[:, :, :512], pages, lengths, page_size=16, scale=0.1)


def _prompts(head_dim: int, window: int | None, dtype: torch.dtype = torch.bfloat16) -> None:
    """Four query heads to a key; GPT-OSS, whose layers have windows, has sinks too."""
    query, keys = _new(64, 32, head_dim, dtype=dtype), _new(8, 4096, head_dim, dtype=dtype)
    values = _new(8, 4096, min(head_dim, 128), dtype=dtype)
    prompts = prompt_attention.Prompts(_new(4, 4, dtype=torch.int32), _new(64, dtype=torch.int64))
    sinks = None if window is None else _new(32, dtype=dtype)
    out = _new(64, 32, values.shape[2], dtype=dtype)
    prompt_attention.attend_to_prompts(
        query, keys, values, prompts, out, page_size=16, scale=0.1, window=window, sinks=sinks
    )


def _prompts_of_latents() -> None:
    """DeepSeek's: keys of 128 and 64 numbers, the second part for all heads."""
    query, rest = _new(64, 16, 192), _new(64, 16, 64)
    made, rows = _new(4096, 16, 256).transpose(0, 1), _new(4096, 576)
    prompts = prompt_attention.Prompts(_new(4, 4, dtype=torch.int32), _new(64, dtype=torch.int64))
    prompt_attention.attend_to_prompts(
        query[..., :128],
        made[..., :128],
        made[..., 128:],
        prompts,
        _new(64, 16, 128),
        page_size=16,
        scale=0.1,
        rest=prompt_attention.Rest(rest, rows[:, 512:]),
    )


def _turns(kind: Rotary) -> rotary.Turns:
    table = _new(4096, 32, dtype=torch.float32)
    return rotary.Turns(table, table, _new(4, dtype=torch.int64), kind)


def _rotate_heads(kind: Rotary) -> None:
    """Qwen3's norms of heads."""
    norms = rotary.HeadNorms(_new(128), _new(128), 1e-6)
    cache = _new(4, 4096, 128)
    rotary.rotate_heads(_new(4, 40 * 128), _turns(kind), norms, _new(4, dtype=torch.int64), cache, cache)


def _rotate_latents(kind: Rotary) -> None:
    query, latents, rows = _new(4, 16, 192), _new(4, 576), _new(1, 4096, 576)
    slots, rotated = _new(4, dtype=torch.int64), _new(4, 16, 576)[..., 512:]
    rotary.rotate_latents(query, latents, _turns(kind), _new(512), 1e-6, slots, rows, rotated)


def _add_norm(hidden: int) -> None:
    x = _new(4, hidden)
    added = add_norm.Added(_new(4, hidden), _new(4, hidden), _new(4, 1))
    add_norm.add_norm(x, _new(hidden), 1e-6, added, wide=_new(4, hidden, dtype=torch.float32))


def _plan(num_slots: int) -> None:
    state = residency.new_residency(4, EXPERTS, num_slots, META)
    residency.plan(state, 1, _ids(4), (0, num_slots))


def _copy() -> None:
    state = residency.new_residency(4, EXPERTS, 32, META)
    tables = _new(2, 4 * EXPERTS, dtype=torch.int64), _new(2, dtype=torch.int64), _new(2, dtype=torch.int64)
    residency.copy_experts(state, residency.Copies(*tables))


def _decode() -> None:
    state = residency.new_residency(4, EXPERTS, 32, META)
    coded_link.decode(_new(8, 1 << 20, dtype=torch.uint8), _new(3, 7, dtype=torch.int64), state)


def _combine() -> None:
    outputs, weights = _new(32 * TOP_K, HIDDEN, dtype=torch.float32), _new(32, TOP_K, dtype=torch.float32)
    combine.combine(outputs, _ids(32), weights, _slot_of(), _new(32, HIDDEN))


def _gemv_gate_up(format: Format, config: Gemv, group_size: int = GROUP_SIZE) -> None:
    bank = _bank((2, INNER, HIDDEN), format, group_size=group_size)
    gemv.gemv_gate_up(_new(4, HIDDEN), _ids(4), bank, _slot_of(), SILU, config)


def _gemv_down(format: Format, config: Gemv, group_size: int = GROUP_SIZE, num_tokens: int = 8) -> None:
    """Eight tokens fill the GPU, one does not."""
    weights = _new(num_tokens, TOP_K, dtype=torch.float32)
    bank = _bank((HIDDEN, INNER), format, group_size=group_size)
    act, out = _new(num_tokens * TOP_K, INNER), _new(num_tokens, HIDDEN)
    gemv.gemv_down(act, _ids(num_tokens), weights, bank, _slot_of(), out, config)


def _aligned(num_tokens: int, block_t: int) -> align.Aligned:
    num_pairs = num_tokens * TOP_K
    num_tiles = align.max_tiles(num_pairs, EXPERTS, block_t)
    sizes = (num_pairs, EXPERTS, num_tiles, num_tiles)
    return align.Aligned(*(_new(size, dtype=torch.int32) for size in sizes))


def _gate_up(
    format: Format,
    activation: Activation,
    tile: Tile,
    dtype: torch.dtype = torch.bfloat16,
    group_size: int = GROUP_SIZE,
) -> None:
    """GPT-OSS has biases, the others have none."""
    bank = _bank((2, INNER, HIDDEN), format, activation is GPT_OSS, dtype, group_size)
    grouped.gate_up(
        _new(64, HIDDEN, dtype=dtype), bank, _slot_of(), _aligned(64, tile.block_t), TOP_K, activation, tile
    )


def _down(format: Format, tile: Tile, dtype: torch.dtype = torch.bfloat16, group_size: int = GROUP_SIZE) -> None:
    bank = _bank((HIDDEN, INNER), format, dtype=dtype, group_size=group_size)
    outputs = _new(64 * TOP_K, HIDDEN, dtype=torch.float32)
    grouped.down(_new(64 * TOP_K, INNER, dtype=dtype), bank, _slot_of(), _aligned(64, tile.block_t), outputs, tile)
