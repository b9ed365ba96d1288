"""A rank's model: the dense part whole, and its share of the experts, joined to the other ranks.

Knows settings and modules; knows no front and no messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from expert_cache.running.local_experts import RegroupedExperts
from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.engine.mapped_files import MappedFiles
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.engine.runner_loading import load_model, mapped_files
from moe_serve.errors import ConfigError
from moe_serve.offload import build
from moe_serve.parallel.expert_plans import read_hosts
from moe_serve.parallel.modes.exchange import Exchange
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.modes.runner import RankRunner
from moe_serve.parallel.modes.table import make_runner
from moe_serve.parallel.wire.environment import RankAddress
from moe_serve.parallel.wire.rendezvous import bind_narrowly, open_store
from moe_serve.parallel.wire.sockets import GroupWire, connect_all
from moe_serve.scheduling.batch_plan import BatchPlan
from moe_serve.spec import ModelSpec
from moe_serve.text.generation_defaults import eos_token_ids


@dataclass(frozen=True)
class RankModel:
    """What a rank has loaded."""

    share: ExpertShare
    config: EngineConfig
    """As resolved, with as many pages and as long a context as the smallest rank has room for."""
    mode: RankRunner
    files: MappedFiles
    """What it computes from."""


def join_group(place: RankAddress, device: str, timeout_s: float) -> None:
    """Meet the other ranks: NCCL between GPUs, gloo elsewhere. Every collective ends within `timeout_s`.

    A rank's GPU becomes this thread's current one: nothing may be launched on the first rank's.
    """
    bind_narrowly(place)
    timeout = timedelta(seconds=timeout_s)
    own = _device_of(device, place)
    gpu = torch.device(own) if own.startswith("cuda") else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    dist.init_process_group(
        "gloo" if gpu is None else "nccl",
        store=open_store(place, timeout),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        device_id=gpu,
    )


def load(place: RankAddress, config: EngineConfig, parallel: ParallelConfig) -> RankModel:
    """The process group must have been joined. ConfigError."""
    if config.experts.prefetch != "off":
        raise ConfigError("--moe-prefetch works on one device only; leave it off with --devices")
    if config.experts.cache_manager == "device":
        raise ConfigError("--moe-cache-manager device works on one device only; leave it out with --devices")
    if config.kv.prefix_cache_dir is not None:
        raise ConfigError("--prefix-cache-dir works on one device only; leave it out with --devices")
    if config.speculation.is_on:
        raise ConfigError("--speculative-method works on one device only; leave it out with --devices")
    device = _device_of(config.device, place)
    config, loaded, spec = load_model(config.replace(device=device, enforce_eager=True))
    if loaded.state_shapes:
        raise ConfigError(
            f"--devices: ranks do not carry the states of {spec.model_type}'s recurrent layers; use one device"
        )
    local = build.regrouped_experts(config, loaded, spec)
    runner = ModelRunner(config, loaded, spec, frozenset(eos_token_ids(config.model)), local)
    nothing = torch.empty(0, dtype=getattr(torch, config.dtype), device=runner.device)
    share = _share(place, parallel, local, spec, nothing)
    pages, context = _smallest([runner.config.kv.num_pages or 0, runner.config.max_model_len or 0], runner.device)
    config = runner.config.replace(num_kv_pages=pages, max_model_len=context)
    return RankModel(share, config, make_runner(place.rank, parallel, runner, share), mapped_files(config))


def _share(
    place: RankAddress,
    parallel: ParallelConfig,
    local: RegroupedExperts[BatchPlan],
    spec: ModelSpec,
    like: torch.Tensor,
) -> ExpertShare:
    """This rank's experts and the way to the others, within its group of ranks. `like`: has the model's type."""
    store, size = local.store, parallel.ranks_per_group
    first_rank = parallel.group_of(place.rank) * size
    hosts = read_hosts(parallel.expert_plan, store.decoder_layers, store.num_experts, size)
    wire = connect_all(place, parallel.rank_step_s) if like.device.type == "cpu" else GroupWire(like.device)
    exchange = Exchange(place.rank - first_rank, size, len(store.layers), wire, first_rank)
    return ExpertShare(local, hosts, exchange, spec.top_k, like.new_empty(spec.expert_hidden_size))


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
