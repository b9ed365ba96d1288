"""A rank's model: the dense part whole, and its share of the experts, joined to the other ranks.

Knows settings and modules; knows no front and no messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.engine.model_runner import ModelRunner, load_runner
from moe_serve.errors import ConfigError
from moe_serve.parallel.expert_plans import read_hosts
from moe_serve.parallel.modes.exchange import Exchange
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.modes.runner import RankRunner
from moe_serve.parallel.modes.table import MODES
from moe_serve.parallel.modes.traffic import Traffic
from moe_serve.parallel.ranks.grouping import GroupRunner
from moe_serve.parallel.wire.environment import RankAddress
from moe_serve.parallel.wire.rendezvous import bind_narrowly, open_store
from moe_serve.parallel.wire.sockets import GroupWire, connect_all
from moe_serve.spec import ModelSpec
from moe_serve.text.generation_defaults import eos_token_ids


@dataclass(frozen=True)
class RankModel:
    """What a rank has loaded."""

    runner: ModelRunner
    share: ExpertShare
    config: EngineConfig
    """As resolved, with as many pages and as long a context as the smallest rank has room for."""
    mode: RankRunner


def join_group(place: RankAddress, device: str, timeout_s: float) -> None:
    """Meet the other ranks: NCCL between GPUs, gloo elsewhere. Every collective ends within `timeout_s`."""
    bind_narrowly(place)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        "nccl" if _device_of(device, place).startswith("cuda") else "gloo",
        store=open_store(place, timeout),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )


def load(place: RankAddress, config: EngineConfig, parallel: ParallelConfig) -> RankModel:
    """The process group must have been joined. ConfigError."""
    if config.experts.prefetch != "off":
        raise ConfigError("--moe-prefetch works on one device only; leave it off with --devices")
    if config.experts.cache_manager == "device":
        raise ConfigError("--moe-cache-manager device works on one device only; leave it out with --devices")
    device = _device_of(config.device, place)
    config = config.replace(device=device, moe_cache_manager="host", enforce_eager=True)
    eos = frozenset(eos_token_ids(config.model))
    runner, spec = load_runner(config, eos)
    share = _share(place, parallel, runner, spec)
    pages, context = _smallest([runner.config.kv.num_pages or 0, runner.config.max_model_len or 0], runner.device)
    config = runner.config.replace(num_kv_pages=pages, max_model_len=context)
    return RankModel(runner, share, config, _mode(place, parallel, runner, share))


def _share(place: RankAddress, parallel: ParallelConfig, runner: ModelRunner, spec: ModelSpec) -> ExpertShare:
    """This rank's experts and the way to the others, within its group of ranks."""
    local, size = runner.expert_layers, parallel.ranks_per_group
    first_rank = parallel.group_of(place.rank) * size
    layers = local.experts.store.layers
    hosts = read_hosts(parallel.expert_plan, layers, local.experts.store.num_experts, size)
    wire = connect_all(place, parallel.rank_step_s) if runner.device.type == "cpu" else GroupWire(runner.device)
    exchange = Exchange(place.rank - first_rank, size, Traffic(len(layers)), wire, first_rank)
    like = torch.empty(spec.hidden_size, dtype=getattr(torch, runner.config.dtype), device=runner.device)
    return ExpertShare(local, hosts, exchange, spec.top_k, like)


def _mode(place: RankAddress, parallel: ParallelConfig, runner: ModelRunner, share: ExpertShare) -> RankRunner:
    mode = MODES[parallel.ep_mode](runner, share)
    size = parallel.ranks_per_group
    return mode if parallel.ep_groups == 1 else GroupRunner(mode, parallel.group_of(place.rank) * size, size)


def _device_of(device: str, place: RankAddress) -> str:
    """auto and cuda are the GPU with this rank's number on its machine."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{place.local_rank}"
    return device


def _smallest(values: list[int], device: torch.device) -> list[int]:
    """Each value's minimum over the ranks."""
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    agreed: list[int] = tensor.tolist()
    return agreed
