"""Tiny random checkpoints, for the smoke test and for simulations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_parts.lines import is_simulated

from tests.families.tiny_checkpoints import write_checkpoint
from tests.families.tiny_configs import CASES, VOCAB, TinyCase

WIDER: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 128, "intermediate_size": 128},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 128},
    "gpt_oss": {"hidden_size": 128, "intermediate_size": 128},
    "deepseek_v2": {"hidden_size": 128, "moe_intermediate_size": 128},
}
"""So that in bf16 one MiB holds a part of the experts, as it does in float32 in the tests."""
NARROW: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_hidden_layers": 1},
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_hidden_layers": 1},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_hidden_layers": 1},
    "deepseek_v2": {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_hidden_layers": 2}
    | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
}
"""A program of the interpreter takes ten milliseconds. Heads stay as wide as they are."""
CACHE_UNITS = {True: 60, False: 1}
"""--moe-cache-mib that holds a part of the experts: KiB in simulation, MiB otherwise."""


def cache_units() -> int:
    """See CACHE_UNITS."""
    return CACHE_UNITS[is_simulated()]


def checkpoint(family: str, folder: Path) -> Path:
    """A random one of the family, in `folder`."""
    case = CASES[family]
    fields = dict(case.fields) | (NARROW if is_simulated() else WIDER)[family]
    return write_checkpoint(TinyCase(case.model_type, fields, case.seed, case.std), folder)


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Of ids that every vocabulary has, others for each seed, so that no prefix is known."""
    return [[(7 * i + 31 * j + 3 + 89 * seed) % (VOCAB - 1) for j in range(n)] for i, n in enumerate(lengths)]
