"""The closed set of launch configurations, and which one a layer call gets.

Chosen by tokens per expert, weight format, GPU generation and shared memory, from what compiles without spills
(compile_check) and is known to be fast on an H100 (docs/kernels.md); `moe-serve tune` may choose otherwise for one GPU
and shape (tuned.py). A set this small is compiled within seconds when a server starts, and every member is checked.

Shape alphabet: T tokens, K choices, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve_kernels.gpu.gpu_model import GpuModel
from moe_serve_kernels.gpu.weight_format import Format

GEMV_MAX_TOKENS = 8
HOPPER = 90
HOPPER_SHARED_BYTES = 160 << 10
"""Compute capability and shared memory that HOPPER_STEPS need. Blackwell's graphics cards (12.x) have too little."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One grouped matrix product: block_t tokens, block_f outputs, and block_c inputs per loop step."""

    block_t: int
    block_f: int
    block_c: int
    num_warps: int
    num_stages: int
    swap: bool
    """Weights are the matrix operand with the many rows (swap-AB)."""


@dataclass(frozen=True, slots=True)
class Gemv:
    """One matrix-vector product per pair: block_f outputs, and block_c inputs per loop step."""

    block_f: int
    block_c: int
    num_warps: int
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class GroupedConfig:
    """A layer call that sorts pairs by expert. Both products work on the same tiles of tokens."""

    gate_up: Tile
    down: Tile

    def __post_init__(self) -> None:
        assert self.gate_up.block_t == self.down.block_t


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """A layer call that takes every pair for itself."""

    gate_up: Gemv
    down: Gemv


Config = GroupedConfig | GemvConfig

GEMV = {
    "plain": GemvConfig(Gemv(8, 512, 4), Gemv(8, 512, 4)),
    "int8": GemvConfig(Gemv(8, 512, 4), Gemv(8, 512, 4)),
    "fp8": GemvConfig(Gemv(8, 512, 4), Gemv(8, 512, 4)),
    "int8_groups": GemvConfig(Gemv(32, 128, 4), Gemv(32, 128, 4)),
    "fp8_blocks": GemvConfig(Gemv(32, 128, 4), Gemv(32, 128, 4)),
    "int4": GemvConfig(Gemv(32, 128, 4, 4), Gemv(32, 128, 4, 4)),
    "mxfp4": GemvConfig(Gemv(32, 64, 4, 5), Gemv(32, 64, 4, 5)),
    "nvfp4": GemvConfig(Gemv(32, 32, 4, 5), Gemv(32, 32, 4, 5)),
}
"""By weight format."""

FLOAT32 = GroupedConfig(Tile(16, 32, 32, 4, 2, False), Tile(16, 32, 32, 4, 2, False))
"""For float32 activations, with plain weights only; and the last resort of every format where a GPU has little shared
memory."""

HOPPER_BYTES = {
    16: GroupedConfig(Tile(16, 64, 128, 4, 4, True), Tile(16, 64, 128, 4, 4, True)),
    64: GroupedConfig(Tile(64, 64, 64, 4, 3, False), Tile(64, 64, 64, 4, 3, False)),
    128: GroupedConfig(Tile(128, 64, 64, 8, 3, False), Tile(128, 128, 64, 8, 3, False)),
}
"""A code is a byte, whatever its scales are."""
HOPPER_NIBBLES = {
    16: GroupedConfig(Tile(16, 64, 128, 4, 2, True), Tile(16, 64, 128, 4, 2, True)),
    64: GroupedConfig(Tile(64, 128, 128, 8, 2, True), Tile(64, 128, 128, 8, 2, True)),
}
"""Two codes are a byte."""
HOPPER_STEPS = {
    "plain": {
        16: GroupedConfig(Tile(16, 64, 128, 4, 4, True), Tile(16, 64, 128, 4, 4, True)),
        32: GroupedConfig(Tile(32, 64, 128, 4, 3, True), Tile(32, 64, 128, 4, 4, True)),
        64: GroupedConfig(Tile(64, 128, 64, 8, 3, False), Tile(64, 128, 64, 4, 4, False)),
        128: GroupedConfig(Tile(128, 128, 64, 8, 3, False), Tile(128, 128, 64, 8, 4, False)),
    },
    "int8": HOPPER_BYTES,
    "fp8": HOPPER_BYTES,
    "int8_groups": HOPPER_BYTES,
    "fp8_blocks": HOPPER_BYTES,
    "int4": HOPPER_NIBBLES,
    "mxfp4": HOPPER_NIBBLES,
    "nvfp4": HOPPER_NIBBLES,
}
AMPERE_INT8 = {
    16: GroupedConfig(Tile(16, 64, 128, 4, 3, False), Tile(16, 64, 128, 4, 4, False)),
    64: GroupedConfig(Tile(64, 64, 64, 4, 3, False), Tile(64, 64, 64, 4, 3, False)),
}
AMPERE_FP8 = {
    16: GroupedConfig(Tile(16, 64, 128, 4, 3, True), Tile(16, 64, 128, 4, 4, False)),
    64: GroupedConfig(Tile(64, 64, 64, 4, 3, False), Tile(64, 64, 64, 4, 3, False)),
}
AMPERE_INT4 = {
    16: GroupedConfig(Tile(16, 64, 128, 4, 2, True), Tile(16, 64, 128, 4, 2, True)),
    64: GroupedConfig(Tile(64, 32, 128, 4, 2, True), Tile(64, 64, 128, 8, 2, True)),
}
AMPERE_STEPS = {
    "plain": {
        16: GroupedConfig(Tile(16, 64, 128, 4, 3, False), Tile(16, 64, 128, 4, 4, False)),
        64: GroupedConfig(Tile(64, 64, 64, 4, 3, False), Tile(64, 64, 64, 4, 3, False)),
        128: GroupedConfig(Tile(128, 64, 64, 8, 3, False), Tile(128, 128, 64, 8, 3, False)),
    },
    "int8": AMPERE_INT8,
    "fp8": AMPERE_FP8,
    "int8_groups": AMPERE_INT8,
    "fp8_blocks": AMPERE_FP8,
    "int4": AMPERE_INT4,
    "mxfp4": {
        16: GroupedConfig(Tile(16, 64, 128, 4, 3, True), Tile(16, 64, 128, 4, 2, True)),
        64: GroupedConfig(Tile(64, 32, 128, 4, 2, True), Tile(64, 64, 128, 8, 2, True)),
    },
    "nvfp4": AMPERE_INT4,
}
"""Weight format -> tokens of a tile -> configuration."""


def steps_of(gpu: GpuModel, format: Format, is_float32: bool = False) -> dict[int, GroupedConfig]:
    """The grouped configurations of a GPU, by tokens of a tile, ascending.

    float32 activations are multiplied exactly, without matrix instructions: larger tiles than a small one would spill.
    """
    if is_float32:
        return {FLOAT32.gate_up.block_t: FLOAT32}
    return (HOPPER_STEPS if is_large(gpu) else AMPERE_STEPS)[format]


def is_large(gpu: GpuModel) -> bool:
    """HOPPER_STEPS are meant for this GPU and fit it."""
    return gpu.capability >= HOPPER and gpu.shared_bytes >= HOPPER_SHARED_BYTES


def smaller(gpu: GpuModel, format: Format, config: GroupedConfig) -> list[GroupedConfig]:
    """What to try, in this order, where the GPU refuses `config`: ever less shared memory."""
    known = dict.fromkeys((*steps_of(gpu, format).values(), *AMPERE_STEPS[format].values(), FLOAT32))
    return sorted((c for c in known if _staged(c) < _staged(config)), key=_staged, reverse=True)


def _staged(config: GroupedConfig) -> int:
    """Numbers that the pipelines of a configuration keep in shared memory, gate and up side by side."""
    gate_up, down = config.gate_up, config.down
    return max(
        (gate_up.block_t + 2 * gate_up.block_f) * gate_up.block_c * gate_up.num_stages,
        (down.block_t + down.block_f) * down.block_c * down.num_stages,
    )


def candidates(gpu: GpuModel, format: Format) -> list[Config]:
    """Everything `choose` may choose."""
    return [GEMV[format], *steps_of(gpu, format).values()]


def choose(
    gpu: GpuModel, format: Format, num_tokens: int, top_k: int, num_experts: int, is_float32: bool = False
) -> Config:
    """The configuration for T tokens with K choices among E experts.

    Few tokens whose choices rarely meet in one expert gain nothing from sorting. Otherwise the smallest tile that
    holds an average expert's tokens, so that no weight is read twice and little of a tile is empty.
    """
    num_pairs = num_tokens * top_k
    if num_tokens <= GEMV_MAX_TOKENS and num_pairs <= num_experts:
        return GEMV[format]
    return by_tokens(steps_of(gpu, format, is_float32), num_pairs / num_experts)


def by_tokens(steps: dict[int, GroupedConfig], per_expert: float) -> GroupedConfig:
    """The smallest tile that holds that number of tokens, or the largest there is."""
    return next((config for tokens, config in steps.items() if per_expert <= tokens), list(steps.values())[-1])
