"""From settings to experts: mapped or cached, with how many slots, kept by which policy.

The one place where EngineConfig meets the parts of expert_cache. Knows no tokens and no requests.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from expert_cache.activations import ActivationOf
from expert_cache.advice import NextLayer
from expert_cache.arena import HostArena, SlotArena
from expert_cache.cache import ExpertCache
from expert_cache.compute import ExpertCompute
from expert_cache.cuda_slots import CudaArena
from expert_cache.direct_io import DirectFile
from expert_cache.fetch import Fetcher
from expert_cache.layers import ExpertLayers
from expert_cache.mapped import MappedExperts
from expert_cache.policies import find_policy
from expert_cache.pools import global_pool, per_layer
from expert_cache.slots import Slots
from expert_cache.store import ExpertStore
from moe_serve.config import EngineConfig
from moe_serve.errors import ConfigError
from moe_serve.resolve import MIB, has_native_bf16
from moe_serve.spec import ModelSpec

NEVER = 1 << 60
MATRIX_MIN_TOKENS = 32
"""From here on a CPU with matrix instructions is faster in bf16 than our kernel in float32."""
HOST_READERS = 4
"""Threads that copy from the page cache for a GPU: one cannot fill a PCIe link."""


def expert_layers(
    config: EngineConfig, store: ExpertStore, spec: ModelSpec, activation_of: ActivationOf, hf_config: Any
) -> ExpertLayers:
    """Everything that runs a model's experts. `config` must be resolved. ValueError: an unknown activation."""
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    compute = ExpertCompute(activation_of(hf_config), dtype, device, _matrix_tokens(dtype, device))
    if not config.moe_cache_mib:
        return ExpertLayers(MappedExperts(store, compute.prepare), compute)
    slots = slots_of(config, store, spec.top_k)
    policy = find_policy(config.moe_cache_policy)(len(store.layers), store.num_experts)
    cache = ExpertCache(store, compute.prepare, _arena(store, device), slots, policy, _fetcher(device))
    advisor = NextLayer(len(store.layers), store.num_experts) if config.moe_prefetch == "next-layer" else None
    return ExpertLayers(cache, compute, advisor)


def num_slots(moe_cache_mib: int, store: ExpertStore) -> int:
    """Slots that a budget holds."""
    return min(moe_cache_mib * MIB // store.slot_bytes, store.num_total)


def slots_of(config: EngineConfig, store: ExpertStore, top_k: int) -> Slots:
    """How the layers share the slots; see EngineConfig.moe_cache_pool."""
    assert config.moe_cache_mib is not None
    slots, layers = num_slots(config.moe_cache_mib, store), len(store.layers)
    wanted = config.moe_cache_pool
    if wanted == "auto":
        wanted = "per-layer" if slots >= layers * top_k else "global"
    if wanted == "global":
        return global_pool(layers, store.num_experts, slots)
    if slots < layers:
        raise ConfigError(
            f"--moe-cache-pool per-layer: --moe-cache-mib {config.moe_cache_mib} holds {slots} experts, fewer than"
            f" the {layers} layers; give at least {-(-layers * store.slot_bytes // MIB)} or choose global"
        )
    return per_layer(layers, store.num_experts, slots)


def _matrix_tokens(dtype: torch.dtype, device: torch.device) -> int:
    """Tokens per expert from which torch computes instead of our CPU kernel; 0: always."""
    if device.type != "cpu" or dtype == torch.float16:
        return 0
    return MATRIX_MIN_TOKENS if dtype == torch.bfloat16 and has_native_bf16() else NEVER


def _arena(store: ExpertStore, device: torch.device) -> SlotArena:
    """Room for every expert: unused slots cost nothing, and the budget may grow."""
    if device.type == "cuda":
        return CudaArena(store.num_total, store.slot_bytes, device)
    return HostArena(store.num_total, store.slot_bytes)


def _fetcher(device: torch.device) -> Fetcher:
    """On a GPU the host's page cache is the tier below, so reads go through it; on a CPU it is the disk."""
    if device.type == "cuda":
        return Fetcher(HOST_READERS, partial(DirectFile, direct=False))
    return Fetcher()
