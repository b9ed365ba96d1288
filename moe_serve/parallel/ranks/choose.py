"""How a rank does its part of a step, as the settings ask. Knows the modes; knows no sockets."""

from __future__ import annotations

from collections.abc import Callable

from moe_serve.engine.model_runner import ModelRunner
from moe_serve.parallel.config import ParallelConfig
from moe_serve.parallel.modes.coherent_runner import CoherentRunner
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.modes.recompute_runner import RecomputingRunner
from moe_serve.parallel.modes.runner import ConventionalRunner, RankRunner
from moe_serve.parallel.traffic_forecast import cheaper_context

RUNNERS: dict[str, Callable[[ModelRunner, ExpertShare], RankRunner]] = {
    "conventional": ConventionalRunner,
    "send": CoherentRunner,
    "recompute": RecomputingRunner,
}


def way_of(parallel: ParallelConfig, shared: ExpertShare, kv_sizes: tuple[int, int]) -> str:
    """One of forecast.WAYS. `kv_sizes`: elements of a token's keys and values in all layers, and number of layers."""
    if parallel.ep_mode == "conventional":
        return parallel.ep_mode
    if parallel.ep_context != "auto":
        return parallel.ep_context
    return cheaper_context(shared.ownership.hosts, shared.hidden_size, shared.top_k, shared.itemsize, *kv_sizes)


def make_runner(way: str, runner: ModelRunner, shared: ExpertShare) -> RankRunner:
    """`way`: one of forecast.WAYS."""
    return RUNNERS[way](runner, shared)
