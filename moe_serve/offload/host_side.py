"""From settings to what serves missing experts without bringing them: the page cache on a CPU, the CPU beside a GPU."""

from __future__ import annotations

import logging
from functools import partial

import torch

from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.host_compute.calibration import measure
from expert_cache.host_compute.host_copies import HostCopies
from expert_cache.host_compute.host_experts import HostExperts
from expert_cache.host_compute.miss_choice import ByCrossover, FromPageCache, MissChoice
from expert_cache.running.compute import ExpertCompute
from expert_cache.storage.arena import SlotArena
from expert_cache.storage.errors import ExpertReadError
from expert_cache.storage.fetch import Fetcher
from expert_cache.storage.store import ExpertStore
from moe_serve.config import EngineConfig
from moe_serve.errors import CheckpointError, ConfigError
from moe_serve.offload.cpu_compute import cpu_compute

log = logging.getLogger(__name__)


def host_side(
    config: EngineConfig, store: ExpertStore, compute: ExpertCompute, arena: SlotArena, fetcher: Fetcher
) -> tuple[HostExperts | None, MissChoice | None]:
    """Who computes experts on the host, and who chooses them; `arena` is not in use yet.

    Experts that must be copied before the kernel can read them have no host copy to compute from.
    """
    if torch.device(config.device).type == "cpu" and not isinstance(compute, GpuCompute):
        if not config.experts.page_cache or store.is_copied:
            return None, None
        copies = HostCopies(store, compute.prepare)
        return HostExperts(copies, compute, beside_device=False), FromPageCache(copies)
    if not config.experts.cpu_misses:
        return None, None
    if store.is_copied:
        raise ConfigError("--moe-cpu-misses: the CPU's kernel cannot read this checkpoint's encoding where it lies")
    on_cpu = cpu_compute(compute.activation, getattr(torch, config.dtype))
    lane = HostExperts(HostCopies(store, on_cpu.prepare), on_cpu, beside_device=True)
    return lane, _by_crossover(config, store, arena, fetcher, lane)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _by_crossover(
    config: EngineConfig, store: ExpertStore, arena: SlotArena, fetcher: Fetcher, lane: HostExperts
) -> ByCrossover:
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    try:
        costs = measure(store, arena, fetcher, lane, dtype, partial(_synchronize, device))
    except ExpertReadError as error:
        raise CheckpointError(error.message) from error
    log.info(
        "copying an expert to the GPU takes %.2f ms, computing one token on the CPU %.2f ms: the CPU computes missing"
        " experts of up to %d tokens. A token's last bits depend on which experts were resident",
        1e3 * costs.copy_s,
        1e3 * costs.host(1),
        costs.crossover_tokens,
    )
    return ByCrossover(costs)
