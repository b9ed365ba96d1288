"""From settings to experts: mapped or cached, with how many slots, kept by which policy.

The one place where EngineConfig meets the parts of expert_cache. Knows no tokens and no requests.
"""

from __future__ import annotations

from functools import partial

import torch

from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.experts import ResidentExperts
from expert_cache.gpu_managed.layout import device_bytes, layout_of
from expert_cache.gpu_managed.pool import SlotPool
from expert_cache.host_managed.cache import SLOTS_PER_TRANSIT, ExpertCache
from expert_cache.host_managed.experts import HostManagedExperts
from expert_cache.host_managed.memory_guard import MemoryGuard
from expert_cache.policies import find_policy
from expert_cache.policies.policy import Policy
from expert_cache.policies.predicted import Predicted
from expert_cache.prefetch.advisors import Advisor, FromAffinity, FromNextGate
from expert_cache.prefetch.audit import PrefetchAudit
from expert_cache.running.compute import ExpertCompute
from expert_cache.running.local_experts import LocalExperts, RegroupedExperts
from expert_cache.running.mapped import MappedExperts
from expert_cache.simulation.adaptive_quotas import AdaptiveQuotas
from expert_cache.simulation.capacity import Capacity, global_pool, least_mib, per_layer, slots_in
from expert_cache.simulation.events import events_of
from expert_cache.simulation.live_shadows import LiveShadows
from expert_cache.simulation.observers import Observers
from expert_cache.simulation.quotas import quota_slots
from expert_cache.storage.arena import HostArena, SlotArena
from expert_cache.storage.copy_stream import CudaCopyStream, SlotOrder
from expert_cache.storage.cuda_arena import CudaArena
from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.fetch import Fetcher
from expert_cache.storage.store import ExpertStore
from expert_cache.storage.transit import Transit
from moe_serve.config import EngineConfig
from moe_serve.errors import CheckpointError, ConfigError
from moe_serve.expert_routes.live_predictor import LivePredictor
from moe_serve.hf.checkpoint import checkpoint_fingerprint
from moe_serve.hf.loading import LoadedModel
from moe_serve.hf.routers import find_routers
from moe_serve.memory import free_bytes
from moe_serve.offload import deepspeed_io
from moe_serve.offload.cpu_compute import cpu_compute
from moe_serve.offload.gpu_managed import gpu_managed_experts
from moe_serve.offload.host_side import host_side
from moe_serve.scheduling.batch_plan import BatchPlan
from moe_serve.spec import ModelSpec
from moe_serve_base.extensions import ExtensionError
from moe_serve_kernels import gpu
from moe_serve_kernels.cpu.expert_mlp import Activation
from predictors import files as predictor_files
from predictors.predictor import RouterShape
from predictors.trace import RoutingTrace, TraceError
from predictors.trace import load as load_trace

PROFILE_TOKENS = 8192
"""Of a profile, for quotas: more change nothing but the time it takes."""
DISK_READERS = 2
"""One reads while the other verifies what it has read; a single reader left a disk of 1.5 GB/s idle meanwhile."""
HOST_READERS = 4
"""Threads that copy from the page cache for a GPU: one cannot fill a PCIe link."""


def experts(config: EngineConfig, loaded: LoadedModel, spec: ModelSpec) -> LocalExperts[BatchPlan]:
    """What runs a model's experts, in the fastest way that settings and machine allow. `config` must be resolved.

    CheckpointError: an unknown activation.
    """
    store, compute = loaded.store, _compute(config, loaded)
    managed = None
    if not _holds_all(compute, store):
        managed = gpu_managed_experts(config, store, compute, torch.device(config.device))
    return managed or _regrouped(config, loaded, spec, compute)


def regrouped_experts(config: EngineConfig, loaded: LoadedModel, spec: ModelSpec) -> RegroupedExperts[BatchPlan]:
    """As `experts`, where some of a token's experts run elsewhere. CheckpointError."""
    return _regrouped(config, loaded, spec, _compute(config, loaded))


def _regrouped(
    config: EngineConfig, loaded: LoadedModel, spec: ModelSpec, compute: ExpertCompute
) -> RegroupedExperts[BatchPlan]:
    if isinstance(compute, GpuCompute) and _holds_all(compute, loaded.store):
        return ResidentExperts(loaded.store, compute, torch.device(config.device))
    if not config.experts.cache_mib:
        return MappedExperts(loaded.store, compute)
    return _host_managed(config, loaded, spec, compute)


def _holds_all(compute: ExpertCompute, store: ExpertStore) -> bool:
    """A GPU's pool has room for every expert."""
    return isinstance(compute, GpuCompute) and compute.pool.num_free >= store.num_total


def _host_managed(
    config: EngineConfig, loaded: LoadedModel, spec: ModelSpec, compute: ExpertCompute
) -> HostManagedExperts[BatchPlan]:
    store, device = loaded.store, torch.device(config.device)
    profile = _profile(config, store)
    capacity, num_transit = capacity_of(config, store, spec.top_k, profile)
    policy = _policy(config, store, profile)
    arena, fetcher = _arena(store, device, compute), _fetcher(config, device)
    host, misses = host_side(config, store, compute, arena, fetcher)
    cache = ExpertCache(
        store,
        compute.prepare,
        arena,
        capacity,
        num_transit,
        policy,
        fetcher,
        observers=_observers(config, store, policy, capacity),
        misses=misses,
    )
    predictor = _predictor(config, store, spec, policy)
    advisor = predictor if config.experts.prefetch == "predictor" else _advisor(config, loaded, spec)
    audit = PrefetchAudit(cache.counters, store.expert_bytes) if advisor and config.experts.prefetch_audit else None
    # A GPU's pool is one piece of memory: fewer slots would give nothing back.
    gives_back = not isinstance(compute, GpuCompute)
    guard = MemoryGuard(cache.num_slots, store.slot_bytes, partial(free_bytes, device)) if gives_back else None
    return HostManagedExperts(
        cache, compute, advisor, audit, host, predictor, guard, slot_bytes=slot_bytes_of(config, store)
    )


def _advisor(config: EngineConfig, loaded: LoadedModel, spec: ModelSpec) -> Advisor | None:
    """What says which experts to bring ahead of time, if no trained predictor does."""
    store = loaded.store
    if config.experts.prefetch == "off":
        return None
    if config.experts.prefetch == "affinity":
        return FromAffinity(len(store.layers), store.num_experts)
    routers = find_routers(loaded.model, spec.num_experts, spec.hidden_size)
    if len(routers) != len(store.layers):
        raise ConfigError("--moe-prefetch next-gate: no router was found beside every layer's experts; choose affinity")
    return FromNextGate(routers)


def _predictor(config: EngineConfig, store: ExpertStore, spec: ModelSpec, policy: Policy) -> LivePredictor | None:
    """The user's trained predictor; ConfigError if it is not one of this model."""
    if config.experts.predictor is None:
        return None
    shape = RouterShape(store.decoder_layers, store.num_experts, spec.top_k)
    try:
        found = predictor_files.load(config.experts.predictor, shape, checkpoint_fingerprint(config.model)).predictor
    except predictor_files.PredictorFileError as error:
        raise ConfigError(f"--moe-predictor: {error}") from error
    return LivePredictor(found, len(store.layers), policy if isinstance(policy, Predicted) else None)


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


def _observers(config: EngineConfig, store: ExpertStore, policy: Policy, capacity: Capacity) -> Observers:
    shape = len(store.layers), store.num_experts
    quotas = AdaptiveQuotas(*shape) if config.experts.cache_pool == "adaptive" else None
    return Observers(policy, capacity, *shape, _shadows(config, store, capacity), quotas)


def _shadows(config: EngineConfig, store: ExpertStore, capacity: Capacity) -> LiveShadows | None:
    if config.experts.cache_shadow is None:
        return None
    names = [name.strip() for name in config.experts.cache_shadow.split(",")]
    try:
        needy = [name for name in names if find_policy(name).needs]
        if needy:
            raise ValueError(f"{needy[0]} needs a {find_policy(needy[0]).needs} and cannot run as a shadow")
        return LiveShadows(names, capacity, len(store.layers), store.num_experts)
    except ValueError as error:
        raise ConfigError(f"--moe-cache-shadow: {error}") from error


def capacity_of(
    config: EngineConfig, store: ExpertStore, top_k: int, profile: RoutingTrace | None = None
) -> tuple[Capacity, int]:
    """How the layers share the slots (ExpertCacheConfig.cache_pool), and how many more are in transit."""
    assert config.experts.cache_mib is not None
    slot_bytes = slot_bytes_of(config, store)
    slots, layers = slots_in(config.experts.cache_mib, slot_bytes, store.num_total), len(store.layers)
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
            f" the {layers} layers; give at least {least_mib(layers, slot_bytes)} or choose global"
        )
    if wanted == "quota":
        if profile is None:
            raise ConfigError("--moe-cache-pool quota needs --moe-cache-profile, a trace to solve the quotas from")
        return quota_slots(events_of(profile.head(PROFILE_TOKENS)), slots), num_transit
    return per_layer(layers, store.num_experts, slots), num_transit


def _compute(config: EngineConfig, loaded: LoadedModel) -> ExpertCompute:
    """On a GPU with triton: our kernels over a pool that takes the whole budget."""
    store, dtype, device = loaded.store, getattr(torch, config.dtype), torch.device(config.device)
    activation = _activation(config, loaded)
    if not gpu.is_available(device):
        on_cpu = device.type == "cpu"
        return cpu_compute(activation, dtype) if on_cpu else ExpertCompute(activation, dtype, device, matrix_tokens=0)
    budget, most = config.experts.cache_mib, store.num_total
    slots = slots_in(budget, slot_bytes_of(config, store), most) if budget else most
    layout = layout_of(store.weights(store.layers[0], 0), dtype)
    return GpuCompute(activation, dtype, device, SlotPool(layout, slots, device))


def _activation(config: EngineConfig, loaded: LoadedModel) -> Activation:
    try:
        return loaded.family.activation(loaded.hf_config)
    except ValueError as error:  # one that we do not have
        raise CheckpointError(f"{config.model}/config.json: {error}") from error


def _arena(store: ExpertStore, device: torch.device, compute: ExpertCompute) -> SlotArena:
    """Room for every expert: unused slots cost nothing, and the budget may grow, except where a pool is fixed."""
    num_slots = compute.pool.num_free if isinstance(compute, GpuCompute) else store.num_total
    if device.type != "cuda":
        return HostArena(num_slots, store.slot_bytes)
    if not isinstance(compute, GpuCompute):
        return CudaArena(num_slots, store.slot_bytes, device)
    stream = CudaCopyStream(device)
    compute.pool.order = SlotOrder(stream)
    return Transit(num_slots, store.slot_bytes, device, stream)


def _fetcher(config: EngineConfig, device: torch.device) -> Fetcher:
    """On a GPU the host's page cache is the tier below, so reads go through it; on a CPU it is the disk."""
    if config.experts.io == "deepspeed":
        return Fetcher(DISK_READERS, deepspeed_io.opener(config.experts.expert_file))
    if device.type == "cuda":
        return Fetcher(HOST_READERS, partial(DirectFile, direct=False))
    return Fetcher(DISK_READERS)
