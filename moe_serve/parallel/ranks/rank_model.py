"""A rank's model: the dense part whole, and its share of the experts, joined to the other ranks.

Knows settings and modules; knows no front and no messages.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from moe_serve.config import EngineConfig
from moe_serve.engine.model_runner import ModelRunner, load_model
from moe_serve.errors import ConfigError
from moe_serve.offload import build
from moe_serve.parallel.config import ParallelConfig
from moe_serve.parallel.expert_plans import read_hosts
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.modes.ownership import Ownership
from moe_serve.parallel.wire.environment import RankAddress
from moe_serve.parallel.wire.exchange import Exchange
from moe_serve.parallel.wire.sockets import GroupWire, connect_all
from moe_serve.parallel.wire.traffic import Traffic
from moe_serve.text.generation_defaults import eos_token_ids


def join_group(place: RankAddress, parallel: ParallelConfig, config: EngineConfig) -> None:
    """Meet the other ranks: NCCL between GPUs, gloo elsewhere. Every collective ends within `rank_step_s`."""
    on_gpu = _device_of(config, place).startswith("cuda")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{place.master_addr}:{place.master_port}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=parallel.rank_step_s),
    )


def load(config: EngineConfig, parallel: ParallelConfig, place: RankAddress) -> tuple[ModelRunner, ExpertShare]:
    """This rank's runner, whose pages are as many as the smallest rank has room for. ConfigError."""
    if config.experts.prefetch != "off":
        raise ConfigError("--moe-prefetch works on one device only; leave it off with --devices")
    if config.experts.cache_manager == "device":
        raise ConfigError("--moe-cache-manager device works on one device only; leave it out with --devices")
    config = config.replace(device=_device_of(config, place), enforce_eager=True)
    config, loaded, spec = load_model(config)
    local, store = build.regrouped_experts(config, loaded, spec), loaded.store
    runner = ModelRunner(config, loaded, spec, frozenset(eos_token_ids(config.model)), local)
    size = parallel.ranks_per_group
    first_rank = parallel.group_of(place.rank) * size
    hosts = read_hosts(parallel.expert_plan, store.decoder_layers, store.num_experts, size)
    device = runner.device
    wire = connect_all(place, parallel.rank_step_s) if device.type == "cpu" else GroupWire(device)
    exchange = Exchange(place.rank - first_rank, size, Traffic(len(store.layers)), wire, first_rank)
    like = torch.empty(spec.hidden_size, dtype=getattr(torch, runner.config.dtype), device=device)
    ownership = Ownership(hosts, exchange.rank, device)
    return runner, ExpertShare(local, ownership, exchange, spec.top_k, like)


def _device_of(config: EngineConfig, place: RankAddress) -> str:
    """auto and cuda are the GPU with this rank's number on its machine."""
    if config.device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{place.local_rank}"
    return config.device


def smallest(values: list[int], device: torch.device) -> list[int]:
    """Each value's minimum over the ranks."""
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    agreed: list[int] = tensor.tolist()
    return agreed
