"""From settings to experts: mapped or cached, with how many slots, kept by which policy.

The one place where EngineConfig meets the parts of expert_cache. Knows no tokens and no requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from expert_cache.capacity import Capacity
from expert_cache.compute import ExpertCompute
from expert_cache.gpu_managed import pool as gpu_pool
from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.layout import device_bytes, layout_of
from expert_cache.gpu_managed.resident import ResidentExperts
from expert_cache.host_managed.cache import SLOTS_PER_TRANSIT, ExpertCache
from expert_cache.host_managed.pools import global_pool, per_layer
from expert_cache.layers import ExpertLayers
from expert_cache.mapped import MappedExperts
from expert_cache.policies import find_policy
from expert_cache.policies.policy import Policy
from expert_cache.policies.predicted import Predicted
from expert_cache.prefetch.advisors import Advisor, FromAffinity, FromNextGate
from expert_cache.prefetch.audit import PrefetchAudit
from expert_cache.simulation.adaptive_quotas import AdaptiveQuotas
from expert_cache.simulation.events import events_of
from expert_cache.simulation.live_shadows import LiveShadows
from expert_cache.simulation.quotas import quota_slots
from expert_cache.storage.arena import HostArena, SlotArena
from expert_cache.storage.cuda_arena import CudaArena, CudaTransit
from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.fetch import Fetcher
from expert_cache.storage.store import ExpertStore
from moe_serve.config import EngineConfig
from moe_serve.config.units import MIB
from moe_serve.errors import ConfigError
from moe_serve.expert_routes.live_predictor import LivePredictor
from moe_serve.hf.activations import ActivationOf
from moe_serve.hf.checkpoint import checkpoint_fingerprint
from moe_serve.offload import deepspeed_io
from moe_serve.offload.cpu_compute import cpu_compute
from moe_serve.offload.gpu_managed import device_cache
from moe_serve.offload.host_side import host_side
from moe_serve.spec import ModelSpec
from moe_serve_base.extensions import ExtensionError
from moe_serve_kernels.cpu.expert_mlp import Activation
from predictors import files as predictor_files
from predictors.methods.next_gate import Router
from predictors.predictor import RouterShape
from predictors.trace import RoutingTrace, TraceError
from predictors.trace import load as load_trace

PROFILE_TOKENS = 8192
"""Of a profile, for quotas: more change nothing but the time it takes."""
DISK_READERS = 2
"""One reads while the other verifies what it has read; a single reader left a disk of 1.5 GB/s idle meanwhile."""
HOST_READERS = 4
"""Threads that copy from the page cache for a GPU: one cannot fill a PCIe link."""


def expert_layers(
    config: EngineConfig,
    store: ExpertStore,
    spec: ModelSpec,
    activation_of: ActivationOf,
    hf_config: Any,
    routers: Sequence[Router] = (),
) -> ExpertLayers:
    """Everything that runs a model's experts. `config` must be resolved; `routers`: each MoE layer's gate.

    ValueError: an unknown activation.
    """
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    compute = _compute(config, store, activation_of(hf_config), dtype, device)
    if isinstance(compute, GpuCompute) and compute.pool.num_free >= store.num_total:
        return ExpertLayers(ResidentExperts(store, compute, device), compute)
    if (managed := device_cache(config, store, compute, device)) is not None:
        return ExpertLayers(managed, compute)
    if not config.experts.cache_mib:
        return ExpertLayers(MappedExperts(store, compute.prepare), compute)
    profile = _profile(config, store)
    slots, num_transit = slots_of(config, store, spec.top_k, profile)
    policy = _policy(config, store, profile)
    arena, fetcher = _arena(store, device, compute), _fetcher(config, device)
    host, misses = host_side(config, store, compute, arena, fetcher)
    cache = ExpertCache(
        store,
        compute.prepare,
        arena,
        slots,
        num_transit,
        policy,
        fetcher,
        shadows=_shadows(config, store, slots),
        quotas=AdaptiveQuotas(len(store.layers), store.num_experts)
        if config.experts.cache_pool == "adaptive"
        else None,
        misses=misses,
    )
    advisor = _advisor(config, store, routers)
    predictor = _predictor(config, store, spec, policy)
    if config.experts.prefetch == "predictor":
        advisor = predictor
    audit = PrefetchAudit(cache.counters, store.expert_bytes) if advisor and config.experts.prefetch_audit else None
    layers = ExpertLayers(cache, compute, advisor, audit, host)
    layers.watcher = predictor
    return layers


def _advisor(config: EngineConfig, store: ExpertStore, routers: Sequence[Router]) -> Advisor | None:
    """Whoever says what to bring ahead of time."""
    if config.experts.prefetch in ("off", "predictor"):
        return None
    if config.experts.prefetch == "affinity":
        return FromAffinity(len(store.layers), store.num_experts)
    if len(routers) != len(store.layers):
        raise ConfigError("--moe-prefetch next-gate: no router was found beside every layer's experts; choose affinity")
    return FromNextGate(routers)


def _predictor(config: EngineConfig, store: ExpertStore, spec: ModelSpec, policy: Policy) -> LivePredictor | None:
    """The user's trained predictor; ConfigError if it is not one of this model."""
    if config.experts.predictor is None:
        return None
    shape = RouterShape(len(store.layers), store.num_experts, spec.top_k)
    try:
        found = predictor_files.load(config.experts.predictor, shape, checkpoint_fingerprint(config.model)).predictor
    except predictor_files.PredictorFileError as error:
        raise ConfigError(f"--moe-predictor: {error}") from error
    return LivePredictor(found, len(store.layers), policy if isinstance(policy, Predicted) else None)


def num_slots(moe_cache_mib: int, store: ExpertStore, slot_bytes: int) -> int:
    """Slots that a budget holds."""
    return min(moe_cache_mib * MIB // slot_bytes, store.num_total)


def slot_bytes_of(config: EngineConfig, store: ExpertStore) -> int:
    """What a slot takes of the budget."""
    return device_bytes(store, getattr(torch, config.dtype), torch.device(config.device))


def _profile(config: EngineConfig, store: ExpertStore) -> RoutingTrace | None:
    """The trace the user gave; ConfigError if it cannot be one of this model."""
    if config.experts.cache_profile is None:
        return None
    try:
        trace = load_trace(config.experts.cache_profile)
    except TraceError as error:
        raise ConfigError(f"--moe-cache-profile: {error}") from error
    if (trace.num_layers, trace.num_experts) != (len(store.layers), store.num_experts):
        raise ConfigError(
            f"--moe-cache-profile {config.experts.cache_profile}: {trace.num_layers} layers of {trace.num_experts}"
            f" experts; this model has {len(store.layers)} of {store.num_experts}; record a trace of this model"
        )
    return trace


def _policy(config: EngineConfig, store: ExpertStore, profile: RoutingTrace | None) -> Policy:
    try:
        maker = find_policy(config.experts.cache_policy)
    except ExtensionError as error:
        raise ConfigError(f"--moe-cache-policy: {error}") from error
    if maker.needs == "popularity" and profile is None:
        raise ConfigError(f"--moe-cache-policy {config.experts.cache_policy} needs --moe-cache-profile")
    return maker(len(store.layers), store.num_experts, None if profile is None else profile.popularity())


def _shadows(config: EngineConfig, store: ExpertStore, slots: Capacity) -> LiveShadows | None:
    if config.experts.cache_shadow is None:
        return None
    names = [name.strip() for name in config.experts.cache_shadow.split(",")]
    try:
        needy = [name for name in names if find_policy(name).needs]
        if needy:
            raise ValueError(f"{needy[0]} needs a {find_policy(needy[0]).needs} and cannot run as a shadow")
        return LiveShadows(names, slots, len(store.layers), store.num_experts)
    except ValueError as error:
        raise ConfigError(f"--moe-cache-shadow: {error}") from error


def slots_of(
    config: EngineConfig, store: ExpertStore, top_k: int, profile: RoutingTrace | None = None
) -> tuple[Capacity, int]:
    """How the layers share the slots (ExpertCacheConfig.cache_pool), and how many more are in transit."""
    assert config.experts.cache_mib is not None
    slot_bytes = slot_bytes_of(config, store)
    slots, layers = num_slots(config.experts.cache_mib, store, slot_bytes), len(store.layers)
    num_transit = min(top_k, slots // SLOTS_PER_TRANSIT) if slots < store.num_total else 0
    slots -= num_transit
    wanted = config.experts.cache_pool
    if wanted == "auto":
        wanted = "per-layer" if slots >= layers * top_k else "global"
    if wanted == "global":
        return global_pool(layers, store.num_experts, slots), num_transit
    if slots < layers:
        raise ConfigError(
            f"--moe-cache-pool {wanted}: --moe-cache-mib {config.experts.cache_mib} holds {slots} experts, fewer than"
            f" the {layers} layers; give at least {-(-layers * slot_bytes // MIB)} or choose global"
        )
    if wanted == "quota":
        if profile is None:
            raise ConfigError("--moe-cache-pool quota needs --moe-cache-profile, a trace to solve the quotas from")
        return quota_slots(events_of(profile.head(PROFILE_TOKENS)), slots), num_transit
    return per_layer(layers, store.num_experts, slots), num_transit


def _compute(
    config: EngineConfig, store: ExpertStore, activation: Activation, dtype: torch.dtype, device: torch.device
) -> ExpertCompute:
    """On a GPU with triton: our kernels over a pool that takes the whole budget."""
    if not gpu_pool.is_available(device):
        on_cpu = device.type == "cpu"
        return cpu_compute(activation, dtype) if on_cpu else ExpertCompute(activation, dtype, device, matrix_tokens=0)
    budget = config.experts.cache_mib
    slots = num_slots(budget, store, slot_bytes_of(config, store)) if budget else store.num_total
    layout = layout_of(store.weights(store.layers[0], 0), dtype)
    pool = gpu_pool.SlotPool(layout, slots, device)
    return GpuCompute(activation, dtype, device, pool)


def _arena(store: ExpertStore, device: torch.device, compute: ExpertCompute) -> SlotArena:
    """Room for every expert: unused slots cost nothing, and the budget may grow, except where a pool is fixed."""
    num_slots = compute.pool.num_free if isinstance(compute, GpuCompute) else store.num_total
    if device.type != "cuda":
        return HostArena(num_slots, store.slot_bytes)
    arena = CudaTransit if isinstance(compute, GpuCompute) else CudaArena
    return arena(num_slots, store.slot_bytes, device)


def _fetcher(config: EngineConfig, device: torch.device) -> Fetcher:
    """On a GPU the host's page cache is the tier below, so reads go through it; on a CPU it is the disk."""
    if config.experts.io == "deepspeed":
        return Fetcher(DISK_READERS, deepspeed_io.opener(config.experts.expert_file))
    if device.type == "cuda":
        return Fetcher(HOST_READERS, partial(DirectFile, direct=False))
    return Fetcher(DISK_READERS)
