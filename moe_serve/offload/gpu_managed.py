"""Whether a GPU can manage its expert cache by itself, and why not: settings and machine against what it needs.

Knows no tokens and no requests.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from expert_cache.gpu_managed.cache import GpuManagedExperts, host_bytes
from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.running.compute import ExpertCompute
from expert_cache.storage.store import ExpertStore
from moe_serve.config import EngineConfig
from moe_serve.errors import ConfigError
from moe_serve.memory import free_bytes, release_pinned

log = logging.getLogger(__name__)

HOST_SHARE = 0.8
"""Of the free host memory, for pinned experts: what is pinned cannot be taken back from us."""
GIB = 1 << 30


def gpu_managed_experts(
    config: EngineConfig, store: ExpertStore, compute: ExpertCompute, device: torch.device
) -> GpuManagedExperts | None:
    """Experts in a cache that the GPU manages, or None, with a line in the log that says why not.

    ConfigError where the user asks for it and it cannot be.
    """
    if config.experts.cache_manager == "host":
        return None
    is_required = config.experts.cache_manager == "device"
    if isinstance(compute, GpuCompute):
        reason = next(_hindrances(config, store, compute), None)
        if reason is None:
            try:
                return GpuManagedExperts(store, compute, device)
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
            release_pinned()  # what was read before it failed, which the error's frames held until here
        if not is_required:
            log.warning("the host manages the expert cache, not the GPU, because %s", reason)
    else:
        reason = "there is no GPU with triton"
    if is_required:
        raise ConfigError(f"--moe-cache-manager device: {reason}; choose auto or host")
    return None


def _hindrances(config: EngineConfig, store: ExpertStore, compute: GpuCompute) -> Iterator[str]:
    """What speaks against it."""
    reason = config.experts.needs_host()
    if reason is not None:
        yield reason
    slots, layers = compute.pool.num_free, len(store.layers)
    if slots < layers:
        yield f"--moe-cache-mib holds {slots} experts, fewer than the {layers} layers"
    needed, free = host_bytes(store, compute), free_bytes(torch.device("cpu"))
    if needed > HOST_SHARE * free:
        yield f"all experts take {needed / GIB:.1f} GiB of pinned memory, and only {free / GIB:.1f} GiB are free"
